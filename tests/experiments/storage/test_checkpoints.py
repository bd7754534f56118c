import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import RecordingReporter, recipe, run_of, train_run, untimed
from torch import Tensor

from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage import checkpoints
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS
from steppe.experiments.training.stopping import Stopped
from stops import StopAfter
from support import each_in_turn


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / CHECKPOINT, weights_only=True)["model"])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


STOPPED = ["sgd", "sam", "looksam:interval=3", "late_sam:start=0.4", "random_sam", "friendly_sam"]
ASKED = [0, 4, 5, 7]  # at the first batch, at an epoch's last one, in the next epoch


@pytest.mark.parametrize(("method", "asked"), each_in_turn(STOPPED, ASKED))
def test_a_stopped_run_resumes_to_the_same_bits(method: str, asked: int, tmp_path: Path) -> None:
    run = run_of(method, momentum=0.9, methods=(method,), eval_every=1)
    whole = train_run(run, tmp_path / "whole")
    with pytest.raises(Stopped):
        train_run(run, tmp_path / "parts", stop=StopAfter(asked))
    torch.manual_seed(12345)  # whatever the process did in between
    assert untimed(train_run(run, tmp_path / "parts")) == untimed(whole)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_finished_run_is_not_trained_again_and_its_metrics_are_restored(tmp_path: Path) -> None:
    run = run_of("sam")
    first = train_run(run, tmp_path)
    (tmp_path / METRICS).write_text("half a li")
    told = RecordingReporter()
    assert train_run(run, tmp_path, reporter=told) == first
    assert not told.steps
    assert (tmp_path / METRICS).read_text().count("\n") == len(first)


def test_time_is_kept_across_a_stop(tmp_path: Path) -> None:
    run = run_of("sgd")
    with pytest.raises(Stopped):
        train_run(run, tmp_path, stop=StopAfter(6))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    state["seconds"] = 1000.0
    checkpoints.save(tmp_path / CHECKPOINT, state.pop("owner"), {k: v for k, v in state.items() if k != "format"})
    assert train_run(run, tmp_path)[-1].seconds > 1000


def test_checkpoints_are_written_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[int, int]] = []
    monkeypatch.setattr(checkpoints, "save", lambda path, owner, state: saved.append((state["epoch"], state["batch"])))
    train_run(run_of("sgd", epochs=2, checkpoint_seconds=0), tmp_path)
    assert saved == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0)]


def flip_a_weight(content: bytes) -> bytes:
    """Flip one bit of the largest tensor: only its checksum shows it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        data = archive.read(entry)
    at = content.index(data) + len(data) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: flip_a_weight(content),
        lambda content: b"something else entirely",
    ],
)
def test_a_damaged_checkpoint_raises(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    run = run_of("sgd")
    train_run(run, tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ExperimentError, match=r"damaged.*Delete .*checkpoint.pt"):
        train_run(run, tmp_path)


def test_a_checkpoint_of_another_run_raises(tmp_path: Path) -> None:
    train_run(run_of("sgd"), tmp_path)
    with pytest.raises(ExperimentError, match="belongs to another run"):
        train_run(run_of("sgd", 1), tmp_path)
    torch.save({"weights": torch.ones(2)}, tmp_path / CHECKPOINT)
    with pytest.raises(ExperimentError, match="is not a checkpoint of a run"):
        train_run(run_of("sgd"), tmp_path)


PAST = "saf:epochs_ago=1,start=1,lmbda={}"


AVERAGE = "mesa:beta=0.5,start=1,lmbda={}"


def make_run(method: str, **fields: object) -> Run:
    return next(recipe(methods=(method,), **fields).runs())


@pytest.mark.parametrize(
    "method", [PAST.format(2), AVERAGE.format(2), "esam", "fraction_sam", "aesam", "bsam", "sassha:interval=3"]
)
def test_state_of_a_step_function_is_in_the_checkpoint(method: str, tmp_path: Path) -> None:
    given = make_run(method)
    whole = train_run(given, tmp_path / "whole")
    with pytest.raises(Stopped):
        train_run(given, tmp_path / "parts", stop=StopAfter(8))
    assert untimed(train_run(given, tmp_path / "parts")) == untimed(whole)
