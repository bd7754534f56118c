import builtins
import re
from pathlib import Path
from types import ModuleType

import pytest

import steppe
from steppe.cli import main
from steppe.experiments.config.recipe import Recipe
from steppe.methods.registry import CARDS


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without the frame around it."""
    captured = capsys.readouterr()
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", captured.out + captured.err).split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert said(capsys) == f"steppe {steppe.__version__}"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["compare", "--epoch", "3"], "Perhaps you meant: --epochs"),
        (["compare", "artcle"], "Available subcommands: demo, article"),
        (["compare", "--methods", "samm"], "'samm' is unknown; did you mean 'sam'?"),
        (["compare", "--device", "gpu"], "Expected one of ('auto', 'cpu', 'cuda')"),
        (["compare", "--epochs", "0"], "the compute that each method gets"),
        (["compare", "--epochs", "ten"], "--epochs: invalid literal"),
        (["compare", "article", "--rho", "-1"], "rho=-1.0: the radius of SAM's neighborhood"),
        (["comprae"], "Available subcommands: compare, tune, measure, plot, methods"),
        (["plot"], "The run folder, for example runs/demo"),
        ([], "Expected one of {compare, tune, measure, plot, methods, finetune}"),
    ],
)
def test_a_wrong_command_line_is_reported_with_a_suggestion(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert answer in said(capsys)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--help"], ["compare", "tune", "plot", "methods", "Begin with `steppe compare`"]),
        (["compare", "--help"], ["demo", "article", "torchrun", "sam: SAM around the base", "128 is ours"]),
        (["compare", "demo", "--help"], ["--seeds INT", "one run gives no verdict", "Standardized epochs"]),
        (["plot", "--help"], ["from the folder alone"]),
        (["methods", "--help"], ["with wildcards", "--bibtex"]),
    ],
)
def test_help_reads_like_documentation(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    text = said(capsys)
    assert all(part in text for part in parts)


@pytest.mark.parametrize("words", [["compare"], ["compare", "--rho", "0.1"], ["compare", "demo"]])
def test_demo_is_the_default(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("steppe.experiments.commands.compare", lambda recipe, *_: seen.append(recipe))
    assert main(words) == 0
    (recipe,) = seen
    assert (recipe.name, recipe.training.rho) == ("demo", 0.1 if "--rho" in words else 0.05)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "amp", "graphs"),
    [
        ([], None, None),
        (["--amp", "--seeds", "2"], True, None),
        (["--no-amp", "--cuda_graphs"], False, True),
        (["--amp", "False", "--no-cuda-graphs"], False, False),
        (["--amp", "None"], None, None),
    ],
)
def test_what_may_be_left_open_is_said_like_any_other_option(
    words: list[str], amp: bool | None, graphs: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr("steppe.experiments.commands.compare", lambda recipe, *_: seen.append(recipe))
    assert main(["compare", *words]) == 0
    assert (seen[0].hardware.amp, seen[0].hardware.cuda_graphs) == (amp, graphs)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "is not a run folder" in err


def listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["methods", *words]) == 0
    return capsys.readouterr().out


def test_methods_are_listed_by_name_and_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    everything = listed([], capsys)
    assert max(map(len, everything.splitlines())) <= 100
    names = [line.split()[0] for line in everything.splitlines() if not line.startswith(" ")]
    assert [n for n in names if n in CARDS] == list(CARDS)
    assert "1 + 1/interval" in everything
    assert "Zhuang et al. 2022" in everything
    some = listed(["look*", "RST"], capsys)
    assert all(name in some for name in ("looksam", "lookbehind_sam", "random_sam"))
    assert "gsam" not in some.partition("Cost:")[0]


@pytest.mark.parametrize("name", ["gsam", "GSAM", "Late SAM", "fraction_sam"])
def test_one_method_shows_its_card(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Checked against" in listed([name], capsys)


def test_a_wildcard_that_finds_one_method_still_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert "when to use it" in listed(["gs*"], capsys)


def test_methods_give_their_bibtex(capsys: pytest.CaptureFixture[str]) -> None:
    entries = listed(["gsam", "looksam", "--bibtex"], capsys)
    assert re.findall(r"^@\w+\{(\w+),$", entries, flags=re.MULTILINE) == [
        "foret2021sam",
        "zhuang2022gsam",
        "liu2022looksam",
    ]


def test_an_unknown_method_is_one_line_that_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "sam", "loksam"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no method matches 'loksam'; did you mean 'looksam'?" in err


def test_a_wrong_data_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--dataset", "fashion-mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert str(tmp_path) in said(capsys)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["compare", "--out", str(tmp_path / "file" / "run")]) == 1
    assert f"Not a directory: {tmp_path / 'file' / 'run'}" in said(capsys)


def test_ctrl_c_while_loading_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steppe.experiments.data.datasets.load", interrupted)
    words = ["compare", "demo", "--out", str(tmp_path / "a folder")]
    assert main(words) == 130
    assert f"To resume: steppe compare demo --out '{tmp_path}/a folder'" in said(capsys)


def forbid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import name` fail as when it is not installed."""
    real = builtins.__import__

    def guarded(module: str, *args: object, **kwargs: object) -> ModuleType:
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_a_missing_extra_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid("rich", monkeypatch)
    assert main(["compare"]) == 1
    assert said(capsys).endswith("rich is not installed, and experiments need it: pip install 'steppe[experiments]'")


def test_a_missing_tensorboard_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib  # noqa: F401 (so that its own imports are not the ones that fail)

    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert main(["compare", "--tensorboard", "--out", str(tmp_path / "run")]) == 1
    assert "pip install 'steppe[tensorboard]'" in said(capsys)
