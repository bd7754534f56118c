"""Every kind of file that a user gives to a command, or that it keeps in a cache, is damaged at random.

A command may end with the result of the undamaged files, with an error of one line that names the file or its folder,
or with a note and another result. Never with another exception, and never with another result without a word.

Damage to a file without a checksum cannot be noticed when the file is read for the first time: a flipped bit in the
weights of a .safetensors or a .pth, another number in config.json, another digit in the code of a task. The digest of
these is printed or stored with the result, and later sessions compare it.
"""

import importlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fine_tuning
import own_tasks
import pytest
import torch
import user_code
from fine_tuning import split
from mutations import mutate
from rich.console import Console
from safetensors.torch import save_file
from tiny import CPU
from torch import Tensor
from user_code import user_folder, weights, written

from steppe.experiments.comparison import compare
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import Dataset, normalize
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.execution.launch import InProcessExecutor
from steppe.experiments.execution.pretraining import with_backbone
from steppe.experiments.measuring.user_inputs import digest_of_file
from steppe.experiments.report import page
from steppe.experiments.report.figures import Figures

__all__ = ["user_folder"]  # a fixture
FEW, MANY = range(12), range(100, 250)
SEEDS = pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
ARGUMENTS = ("train is ", "train: ", "test is ", "test: ")
NO_CHECKSUM = (".pth", ".safetensors")
"""Files of weights that are read as they are: legacy ones of torch.save, and safetensors."""


def campaign(
    folders: Sequence[Path], kinds: Sequence[str], seeds: Sequence[int], run: Callable[[Console], str | None]
) -> list[str]:
    """Damage one file of the folders after the other, and restore them; return what went wrong.

    `run` returns a description of another result that no note and no digest announces. An error must name the damaged
    file, or one of the folders, or the argument of a task, because only the task's own code knows the file of its data.
    """
    kept = {file: file.read_bytes() for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()}
    files = [file for file in kept if file.suffix in kinds]
    wrong = []
    for seed in seeds:
        file = files[seed % len(files)]
        what = f"{file.name}: {mutate(file, seed)}"
        try:
            other = run(Console(file=io.StringIO(), width=1000))
        except ExperimentError as error:
            text = str(error)
            is_named = any(name in text for name in (file.stem, *map(str, folders)))
            if "\n" in text or not (is_named or text.startswith(ARGUMENTS)):
                wrong.append(f"{what}: unclear: {text!r}")
        except BaseException as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if other is not None:
                wrong.append(f"{what}: {other}")
        for folder in folders:
            for path in folder.iterdir():  # not the folder itself, which may be the current one
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, content in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return wrong


def output(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


class Start:
    """The logits of a network as the runs of a folder start from it, and what is printed."""

    def __init__(self, backbone: str, folder: Path) -> None:
        self.folder, self._executor = folder, InProcessExecutor(fine_tuning.recipe(backbone=backbone), CPU)

    def __call__(self, console: Console) -> Tensor:
        self.folder.mkdir(exist_ok=True)
        start = with_backbone(tiny_data("digits"), self._executor, self.folder, console).backbone
        assert start is not None
        torch.manual_seed(0)
        network = start.network(freeze=False).eval()
        with torch.no_grad():
            return network(normalize(split(3, 3).images))  # type: ignore[no-any-return]


def tiny_data(name: str, data_dir: Path | None = None) -> Dataset:
    return Dataset(name, split(72, 0), split(50, 1), "made for tests")


@pytest.fixture(autouse=True)
def tiny_and_undrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "load", tiny_data)
    monkeypatch.setattr(page, "save_all", lambda drawings, folder: [])
    for section in Figures.SECTIONS:
        monkeypatch.setattr(Figures, section, lambda self: [])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@SEEDS
@pytest.mark.parametrize("session", ["first", "second"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_damaged_hugging_face_folder(
    form: str, session: str, seeds: Sequence[int], saved: Path, tmp_path: Path
) -> None:
    hub = Path(shutil.copytree(saved, tmp_path / "hub"))
    if form == "bin":
        from safetensors.torch import load_file

        torch.save(load_file(hub / "model.safetensors"), hub / "pytorch_model.bin")
        (hub / "model.safetensors").unlink()
    start, console = Start(f"hf:{hub}", tmp_path / "run"), Console(file=io.StringIO(), width=1000)
    expected, printed = start(console), output(console)
    assert "(SHA-256 " in printed

    def run(console: Console) -> str | None:
        if session == "first":
            shutil.rmtree(start.folder)
        if torch.equal(start(console), expected):
            return None
        if session == "first" and "(SHA-256 " in (now := output(console)) and now != printed:
            return None  # nothing to compare with: its digest tells it from the intact one
        return "another network without a word"

    assert campaign([hub, start.folder], (".json", ".safetensors", ".bin"), seeds, run) == []


@SEEDS
def test_damaged_cache_of_backbones(seeds: Sequence[int], tmp_path: Path) -> None:
    start = Start("own", tmp_path / "run")
    expected = start(Console(quiet=True))

    def run(console: Console) -> str | None:
        return None if torch.equal(start(console), expected) else "another backbone"

    cache = tmp_path / "cache" / "steppe" / "backbones"
    assert campaign([cache, start.folder], (".json", ".jsonl", ".pt"), seeds, run) == []


TASK = '''
"""A task, with its data in a file."""
from pathlib import Path
import torch
from torch import nn
import torch.nn.functional as F
from steppe.experiments import Task
from helper_of_task import width

def task():
    data = torch.load(Path(__file__).with_name("samples_of_task.pt"), weights_only=True)
    return Task(
        model=lambda: nn.Sequential(nn.Linear(5, width()), nn.Tanh(), nn.Linear(width(), 1)),
        train=(data["inputs"][:32], data["targets"][:32]),
        test=(data["inputs"][32:], data["targets"][32:]),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.02),
        loss=F.mse_loss,
        batch_size=16,
        name="small",
    )
'''


@pytest.fixture
def user_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a task, a module that it imports, and its data."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "damaged_task.py").write_text(TASK)
    (folder / "helper_of_task.py").write_text("def width():\n    return 8\n")
    generator = torch.Generator().manual_seed(0)
    samples = {"inputs": torch.randn(48, 5, generator=generator), "targets": torch.randn(48, 1, generator=generator)}
    torch.save(samples, folder / "samples_of_task.pt")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which would be used for a file of the same second
    yield folder
    forget()


def forget() -> None:
    for module in ("damaged_task", "helper_of_task"):
        sys.modules.pop(module, None)
    importlib.invalidate_caches()


def of_task(out: Path) -> Recipe:
    given = own_tasks.OPTIONS | {"task": "damaged_task:task", "methods": ("sgd", "sam"), "out": out}
    return RECIPES["task"][0].replace(**given)


@SEEDS
def test_damaged_module_or_data_of_a_task(seeds: Sequence[int], user_modules: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def command(console: Console) -> str:
        forget()
        given = of_task(out)
        compare(given, ["steppe"], console, ExecutionOptions(runs_at_once=1))
        return (out / "summary.json").read_text()

    expected = command(Console(quiet=True))

    def run(console: Console) -> str | None:
        if command(console) == expected or "the file of damaged_task:task was changed" in output(console):
            return None
        return "another result without a word"

    assert campaign([user_modules, out], (".py", ".pt"), seeds, run) == []


def three_files() -> tuple[Path, ...]:
    """Files of weights in three forms."""
    (zipped, *_) = weights(1)
    torch.save(user_code.net(2).state_dict(), "w2.pth", _use_new_zipfile_serialization=False)
    save_file(dict(user_code.net(3).state_dict()), "w3.safetensors")
    return zipped, Path("w2.pth"), Path("w3.safetensors")


@SEEDS
def test_damaged_weights_or_results_of_measure(seeds: Sequence[int], user_folder: Path) -> None:
    inputs = user_folder / "inputs"
    inputs.mkdir()
    files = tuple(Path(shutil.move(file, inputs)) for file in three_files())
    names = [file.stem for file in files]

    def measured() -> list[object]:
        return [written(name)["measures"] for name in names]

    user_code.go(weights=files)
    expected = measured()

    def run(console: Console) -> str | None:
        said = user_code.go(weights=files, width=1000)
        return None if measured() == expected or "changed, so it is measured again" in said else "another result"

    kinds = (".json", ".md", ".pt", *NO_CHECKSUM)
    assert campaign([inputs, user_folder / "flatness"], kinds, seeds, run) == []


@SEEDS
def test_weights_that_are_damaged_before_they_are_measured_first(seeds: Sequence[int], user_folder: Path) -> None:
    inputs = user_folder / "inputs"
    inputs.mkdir()
    files = tuple(Path(shutil.move(file, inputs)) for file in three_files())
    user_code.go(weights=files)
    intact = {file: (written(file.stem)["measures"], digest_of_file(file)) for file in files}

    def run(console: Console) -> str | None:
        shutil.rmtree(user_folder / "flatness")
        user_code.go(weights=files)
        for file, (measures, sha256) in intact.items():
            found = written(file.stem)
            if found["measures"] != measures:
                if file.suffix not in NO_CHECKSUM:
                    return "another result, of a file with checksums"
                if found["inputs"]["weights_sha256"] in (sha256, None):
                    return "another result with the digest of the intact file"
        return None

    assert campaign([inputs], (".pt", *NO_CHECKSUM), seeds, run) == []


def test_code_that_ends_the_process_is_an_error(user_modules: Path) -> None:
    for code in (
        "import sys\nsys.exit(3)",
        "raise SystemExit",
        "import argparse\nargparse.ArgumentParser().parse_args(['x'])",
    ):
        forget()
        (user_modules / "damaged_task.py").write_text(code)
        with pytest.raises(
            ExperimentError, match=r"--task damaged_task:task: importing .* SystemExit.*damaged_task\.py:"
        ):
            compare(of_task(user_modules / "out"), ["steppe"], Console(quiet=True))


BROKEN = {
    "null byte": b"x = 1\n\0",
    "syntax": b"def f(:\n",
    "encoding": b"\xff",
    "brackets": b"[" * 100_000,
    "depth": b"(" + b"-" * 100_000 + b"1)",
}


@pytest.mark.parametrize("file", ["damaged_task.py", "helper_of_task.py"])
@pytest.mark.parametrize("name", BROKEN)
def test_code_that_cannot_be_compiled_is_named_by_its_file(name: str, file: str, user_modules: Path) -> None:
    (user_modules / file).write_bytes(BROKEN[name])
    with pytest.raises(ExperimentError, match="--task damaged_task:task") as error:
        compare(of_task(user_modules / "out"), ["steppe"], Console(quiet=True))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    if name in ("syntax", "encoding", "brackets"):
        assert f", at {user_modules / file}:" in str(error.value)
    assert (
        str(user_modules / file) in str(error.value)
        or f"import {Path(file).stem}" in str(error.value)
        or ("from helper_of_task import width" in str(error.value))
    )


def test_another_activation_in_the_configuration_is_another_backbone(saved: Path, tmp_path: Path) -> None:
    hub = Path(shutil.copytree(saved, tmp_path / "hub"))
    start = Start(f"hf:{hub}", tmp_path / "run")
    start(Console(quiet=True))
    config = (hub / "config.json").read_text()
    (hub / "config.json").write_text(config.replace('"relu"', '"gelu"'))  # the weights are the same
    with pytest.raises(ExperimentError, match="started from other weights"):
        start(Console(quiet=True))
    (hub / "config.json").write_text(config.replace("LABEL_", "CLASS_"))  # the head is replaced
    start(Console(quiet=True))


def test_changed_file_of_a_task_is_noted(user_modules: Path, tmp_path: Path) -> None:
    file, printed = user_modules / "damaged_task.py", []
    for code in (TASK, TASK, TASK.replace("lr=0.02", "lr=0.03")):
        file.write_text(code)
        forget()
        console = Console(file=io.StringIO(), width=1000)
        compare(of_task(tmp_path / "run"), ["steppe"], console, ExecutionOptions(runs_at_once=1))
        printed.append("the file of damaged_task:task was changed" in output(console))
    assert printed == [False, False, True]


def test_changed_code_is_measured_again_with_a_note(user_folder: Path) -> None:
    (user_folder / "own_loss.py").write_text("from torch.nn.functional import cross_entropy as loss")
    for _ in range(2):
        assert "Note:" not in user_code.go(weights=weights(1), loss="own_loss:loss")
    before = written("w1")["measures"]
    (user_folder / "user_module.py").write_text(user_code.CODE.replace("nn.Tanh()", "nn.Sigmoid()"))
    sys.modules.pop("user_module")
    said = user_code.go(weights=(Path("w1.pt"),), loss="own_loss:loss", width=1000)
    assert "Note: since w1 was measured here, the code of user_module:net (SHA-256 " in said
    assert written("w1")["measures"] != before
    assert "Note:" not in user_code.go(weights=(Path("w1.pt"),), loss="own_loss:loss")


def test_changed_weights_are_measured_again_with_a_note(user_folder: Path) -> None:
    file = Path("w.pth")
    torch.save(user_code.net(2).state_dict(), file, _use_new_zipfile_serialization=False)
    assert "Note:" not in user_code.go(weights=(file,))
    before = written("w")["measures"]
    torch.save(user_code.net(3).state_dict(), file, _use_new_zipfile_serialization=False)
    said = user_code.go(weights=(file,), width=1000)
    assert "Note: since w was measured here, w.pth (SHA-256 " in said
    assert written("w")["measures"] != before
    assert "Note:" not in user_code.go(weights=(file,))
    assert "Note:" not in user_code.go(weights=(file,), samples=20)
