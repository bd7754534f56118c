import io
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from tiny import command_line, image_record, options, recipe, train_run

from steppe.experiments.analysis import double_descent
from steppe.experiments.analysis.summary import setting
from steppe.experiments.comparison import plot
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.resolve import resolve
from steppe.experiments.errors import ExperimentError
from steppe.experiments.figures import double_descent as double_descent_figure
from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.storage.files import write_json_lines
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import METRICS, RunFolder

PLAIN = {"width": 16}  # Recipe's own, which --widths replaces


def wide(out: Path, widths: tuple[int, ...] = (1, 2, 4), **fields: object) -> Recipe:
    return recipe(**(PLAIN | {"widths": widths, "out": out} | fields))


def test_the_recipe_goes_on_the_command_line_and_into_json() -> None:
    given = RECIPES["double-descent"][0]
    assert len(given.comparison.widths) >= 3
    assert given.data.label_noise > 0
    assert given.hardware.threads == 1
    assert not given.hardware.channels_last
    assert Recipe.from_json(json.loads(json.dumps(given.to_json()))) == given
    assert all(run.flatness_grid == {given.comparison.epochs} for member in given.members() for run in member.runs())


def test_members_are_ordinary_comparisons_in_folders_of_their_own(tmp_path: Path) -> None:
    given = wide(tmp_path, (4, 1))
    assert list(given.runs()) == []
    assert list(given.members()) == [recipe(width=w, out=tmp_path / f"width-{w}") for w in (1, 4)]
    assert list(recipe().members()) == []
    # widths may be added to a folder, but one comparison is no part of several
    assert given.result_options() == wide(tmp_path, (1, 2)).result_options() != recipe(**PLAIN).result_options()


@pytest.mark.parametrize(
    ("fields", "meaning"),
    [
        ({"widths": (2, 2)}, "widths=2 2: channels .* once"),
        ({"widths": (0, 2)}, "widths=0 2: channels .* at least 1"),
        ({"width": 8}, "width=8: widths=1 2 4 are compared, and it would be ignored"),
        ({"backbone": "own", "dataset": "digits"}, "backbone=own: its width is fixed"),
    ],
)
def test_a_wrong_range_is_refused(fields: dict[str, object], meaning: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=meaning):
        wide(tmp_path, **fields)


def test_a_layout_that_is_unsafe_at_one_of_the_widths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="channels_last with width=24 on 2 threads"):
        resolve(wide(tmp_path, (16, 24), channels_last=True, threads=2))
    resolve(wide(tmp_path, (16, 32), channels_last=True, threads=2))


def test_a_search_takes_one_width(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["tune", "double-descent"]) == 2
    assert "widths=1 2 3" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert command_line(words(out), draws=False) == 0  # the picture over the widths is drawn all the same
    return out


def words(out: Path, *more: str) -> list[str]:
    given = options(**PLAIN, epochs=2, out=out)
    return ["compare", "demo", *given, "--widths", "1", "2", *more]


def test_each_width_has_the_bits_of_a_comparison_by_itself(trained: Path, tmp_path: Path) -> None:
    timed = ("seconds", "images_per_second")
    for width in (1, 2):
        for run in recipe(width=width, epochs=2, channels_last=True).runs():
            lines = (trained / f"width-{width}" / "runs" / run.name / METRICS).read_text().splitlines()
            found = [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
            alone = [record.to_json() for record in train_run(run, tmp_path / f"{width}" / run.name, robustness=True)]
            assert found == [{k: v for k, v in record.items() if k not in timed} for record in alone]
    values = json.loads((trained / "summary.json").read_text())
    assert [(p["width"], p["method"]) for p in values["points"]] == [(1, "sgd"), (1, "sam"), (2, "sgd"), (2, "sam")]
    assert (trained / "figures" / "double_descent.png").exists()
    assert (trained / "width-1" / "summary.md").exists()


def test_comparison_resumes_and_takes_further_widths(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = {p: p.read_bytes() for p in out.glob("width-*/runs/*/metrics.jsonl")}
    shutil.rmtree(out / "width-2" / "runs" / "sam-seed0")
    assert command_line(words(out, "3"), draws=False) == 0
    lost = out / "width-2" / "runs" / "sam-seed0" / METRICS
    assert all(p.read_bytes() == content for p, content in before.items() if p != lost)
    assert json.loads(lost.read_text())["train_loss"] == json.loads(before[lost])["train_loss"]
    assert [p["width"] for p in json.loads((out / "summary.json").read_text())["points"]] == [1, 1, 2, 2, 3, 3]


def test_the_folder_alone_is_enough_wherever_it_lies(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    for name in ("summary.md", "figures", "width-1/summary.md"):
        path = moved / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steppe.experiments.report.page.write", lambda folder, recipe, results, summary: folder.path)
        plot(moved, Console(file=io.StringIO()))
    assert (moved / "summary.md").read_text() == (trained / "summary.md").read_text()
    assert (moved / "width-1" / "summary.md").read_text() == (trained / "width-1" / "summary.md").read_text()
    picture = "figures/double_descent.svg"
    assert (moved / picture).read_bytes() == (trained / picture).read_bytes()


def test_failed_run_is_reported_with_its_width_and_the_others_are_trained(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "width-1" / "runs" / "sgd-seed0" / "checkpoint.pt").write_bytes(b"no checkpoint")
    shutil.rmtree(out / "width-2" / "runs")
    assert command_line(words(out), draws=False) == 1
    assert "width 1: the checkpoint" in capsys.readouterr().err
    assert (out / "width-2" / "runs" / "sam-seed0" / METRICS).exists()


def test_another_configuration_and_an_ordinary_folder_are_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(words(trained, "--lr", "0.3")) == 1
    assert "lr was 0.05 and is 0.3" in capsys.readouterr().err
    assert command_line(["compare", "demo", *options(**PLAIN, epochs=2, out=trained)]) == 1
    assert "width was several and is 16" in capsys.readouterr().err


# What is made of the measurements.

TRAIN = {"sgd": {1: 30.0, 2: 5.0, 4: 0.5, 8: 0.0}, "sam": {1: 35.0, 2: 20.0, 4: 2.0, 8: 1.0}}
TEST = {"sgd": {1: 33.0, 2: 40.0, 4: 37.0, 8: 34.0}, "sam": {1: 34.0, 2: 36.0, 4: 36.5, 8: 33.0}}
OFF = (-0.3, 0.0, 0.3)  # by seed


def record(train_error: float, test_error: float, sharpness: float | None) -> Record:
    train, test = 100 - train_error, 100 - test_error
    flat = None if sharpness is None else 3 * sharpness
    return image_record(4, 4, 20, 288, 1.0, 1.0, train, 1.0, test, train - test, 1.0, 72.0, sharpness, flat, flat)


def measured(out: Path, *, sharp: bool = True, wobble: float = 0.0) -> Recipe:
    """A folder with these errors; the seeds differ by the same at every width, and by `wobble` at the peak's."""
    given = wide(out, (1, 2, 4, 8), seeds=3)
    for member in given.members():
        for run in member.runs():
            off = OFF[run.seed] * (1 + wobble * (member.model.width == 2))
            test = TEST[str(run.method)][member.model.width] + off
            early = replace(record(50.0, 50.0, None), standardized_epoch=2)
            one = record(
                TRAIN[str(run.method)][member.model.width], test, (1 + run.seed) / member.model.width if sharp else None
            )
            write_json_lines(RunFolder(member.folder).run(run) / METRICS, [early.to_json(), one.to_json()])
    return given


def test_thresholds_peaks_and_differences(tmp_path: Path) -> None:
    summary = double_descent.summarize(measured(tmp_path))
    assert {str(method): width for method, width in summary.thresholds.items()} == {
        "sgd": 4,
        "sam": None,
    }  # 1.0 is not below 1
    points = {(str(p.method), p.width): p for p in summary.points}
    assert points["sam", 2].test_error.mean == pytest.approx(36.0)
    assert points["sam", 2].test_error.sd == pytest.approx(0.3)
    assert points["sam", 2].against is not None
    assert points["sam", 2].against.mean == pytest.approx(-4.0)
    assert points["sam", 2].against.sd == pytest.approx(0.0, abs=1e-12)  # paired: what the seeds share is gone
    assert points["sgd", 2].against is None
    assert points["sgd", 4].sharpness is not None
    assert points["sgd", 4].sharpness.mean == pytest.approx(0.5)
    assert points["sgd", 4].lambda_max is not None
    assert points["sgd", 4].lambda_max.mean == pytest.approx(1.5)
    (overall,) = summary.overall.values()
    assert overall.mean == pytest.approx((1 - 4 - 0.5 - 1) / 4)
    sgd, sam = summary.peaks
    assert (sgd.width, sam.width) == (2, 4)
    assert sgd.above_narrowest is not None
    assert sgd.above_narrowest.mean == pytest.approx(7.0)
    assert sgd.above_widest is not None
    assert sgd.above_widest.mean == pytest.approx(6.0)
    notes = list(summary.notes())
    assert notes[0] == "SGD interpolates (training error below 1 %) from width 4 on."
    assert notes[1] == "SAM interpolates (training error below 1 %) at none of these widths."
    assert "SGD: test error is highest at width 2, 40.00 %, above width 1 by +7.00" in notes[2]
    assert notes[2].endswith("a peak, and so a double descent.")


def test_peak_within_the_noise_is_not_called_a_double_descent(tmp_path: Path) -> None:
    unclear = double_descent.summarize(measured(tmp_path, wobble=20.0)).peaks[0]
    # differences 7 -+ 6 in three seeds: the interval [-7.9, 21.9] holds 0
    assert "[-7.90, +21.90]" in unclear.sentence()
    assert "which so few runs cannot distinguish from none" in unclear.sentence()
    assert "an end of the range: no double descent is seen" in replace(unclear, above_widest=None).sentence()


def test_missing_runs_are_named_and_not_paired(tmp_path: Path) -> None:
    given = measured(tmp_path)
    stopped = tmp_path / "width-2" / "runs" / "sgd-seed1" / METRICS
    stopped.write_text(stopped.read_text().splitlines()[0] + "\n")  # it has come to the middle
    shutil.rmtree(tmp_path / "width-8")
    summary = double_descent.summarize(given)
    assert "width-2/sgd-seed1" in summary.unfinished
    assert len(summary.unfinished) == 1 + 6
    points = {(str(p.method), p.width): p for p in summary.points}
    assert [points[m, 2].test_error.n for m in map(str, given.comparison.methods)] == [2, 3]
    assert points["sam", 2].against is not None
    assert points["sam", 2].against.n == 2
    assert (summary.peaks[0].above_widest or summary.peaks[1].above_widest) is not None
    assert summary.overall == {}
    assert double_descent.summarize(wide(tmp_path / "nothing")).points == []


def test_terminal_markdown_and_json_of_double_descent_agree(tmp_path: Path) -> None:
    summary, out = double_descent.summarize(measured(tmp_path)), io.StringIO()
    summary.show(Console(width=110, file=out))
    text, markdown = out.getvalue(), summary.markdown()
    for point in summary.points:
        assert all(cell in text and cell in markdown for cell in point.cells())
    assert "…" not in text
    summary.write(RunFolder(tmp_path))
    assert (tmp_path / "summary.md").read_text() == markdown
    assert json.loads((tmp_path / "summary.json").read_text())["notes"] == list(summary.notes())
    assert "(width 1 to 8)" in markdown.splitlines()[0]
    assert "width 16" not in setting(wide(tmp_path, (4,)))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []

    def keep(drawings: Iterable[Drawing], folder: Path) -> list[Path]:
        figures.extend(drawing.figure for drawing in drawings)
        return []

    monkeypatch.setattr(double_descent_figure, "save_all", keep)
    return figures


def test_figure_shows_the_measurements(tmp_path: Path, drawn: list[Figure]) -> None:
    given = measured(tmp_path)
    summary = double_descent.summarize(given)
    double_descent_figure.draw(given, summary, tmp_path / "figures")
    errors, sharpness, eigenvalue = drawn[0].axes[:3]
    sizes = [sum(p.numel() for p in PreActResNet18(w, stem_stride=2).parameters()) for w in (1, 2, 4, 8)]
    lines = {line.get_label(): line.get_xydata().tolist() for line in errors.lines}
    for method, label in (("sgd", "SGD"), ("sam", "SAM")):
        for kind, of in (("test", TEST), ("training", TRAIN)):
            wanted = [[size, value] for size, value in zip(sizes, of[method].values(), strict=True)]
            assert lines[f"{label}, {kind}"] == [pytest.approx(pair) for pair in wanted]
    for axes, factor in ((sharpness, 1), (eigenvalue, 3)):
        assert [list(axes.lines[0].get_ydata())] == [pytest.approx([factor * 2 / w for w in (1, 2, 4, 8)])]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    # SGD's threshold is at width 4 in every panel, and SAM has none
    upright = [
        line for axes in (errors, sharpness, eigenvalue) for line in axes.lines if len(set(line.get_xdata())) == 1
    ]
    assert [set(line.get_xdata()) for line in upright] == [{sizes[2]}] * 3
    assert [text.get_text().strip() for text in errors.texts] == ["SGD's threshold"]
    assert "below 1 %" in drawn[0].get_suptitle()


def test_figure_without_sharpness_or_without_runs_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    for given in (measured(tmp_path / "a", sharp=False), wide(tmp_path / "b")):
        double_descent_figure.draw(given, double_descent.summarize(given), tmp_path / "figures")
    assert [sum(axes.get_title(loc="left") != "" for axes in figure.axes) for figure in drawn] == [1, 1]
