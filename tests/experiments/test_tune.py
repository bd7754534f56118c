"""Choosing rho: what is searched, by which images, and that a search can be stopped anywhere."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_executors import MadeUp
from tiny import CPU, command_line, dataset, options, recipe, untimed

from steppe.cli import main
from steppe.experiments.commands import Compare, parse
from steppe.experiments.config.methods import Value
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.data.validation import hold_out
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import InProcess, Job, Outcome
from steppe.experiments.training.evaluation import Record, read_records
from steppe.experiments.tuning import tune
from steppe.experiments.tuning.result import Findings, Tuning, find
from steppe.experiments.tuning.result import command_line as confirm
from steppe.experiments.tuning.search_space import Listed, Range, grid, read, spaces
from steppe.experiments.tuning.studies import Result, Study, opened

optuna = pytest.importorskip("optuna")

TINY = Path(__file__).with_name("tiny.py")


# --- what is searched ---


@pytest.mark.parametrize(
    ("word", "kind", "wanted"),
    [
        ("rho=0.01..1", float, Range("rho", 0.01, 1.0, log=True)),
        ("rho=0..1:linear", float, Range("rho", 0.0, 1.0, log=False)),
        ("rho=.01..1:log", float, Range("rho", 0.01, 1.0, log=True)),
        ("k=2..8", int, Range("k", 2, 8, log=False, whole=True)),
        ("k=2..64:log", int, Range("k", 2, 64, log=True, whole=True)),
        ("rho=0.1,0.2", float, Listed("rho", (0.1, 0.2))),
        ("adaptive=true,false", bool, Listed("adaptive", (True, False))),
    ],
)
def test_words_are_read_and_written(word: str, kind: type[Value], wanted: object) -> None:
    dimension = read(word, kind)
    assert dimension == wanted
    assert read(str(dimension), kind) == dimension


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["rho"], "'rho' says not what to try: write NAME=LOW..HIGH"),
        (["rho="], "says not what to try"),
        (["rho=1..0.1"], "the range is empty"),
        (["rho=0..1"], "a logarithmic range cannot begin at 0.0: begin above 0, or say rho=0..1:linear"),
        (["rho=0.1..1:logarithmic"], "'logarithmic' is no scale, log and linear are"),
        (["rho=0.1"], "give two values or more"),
        (["rho=0.1,0.1"], "each of them once"),
        (["rho=0.1,high"], "'high' must be a finite number"),
        (["rho=0.1..nan"], "'nan' must be a finite number"),
        (["batch_size=8.5..16"], "'8.5' must be a whole number"),
        (["rho=0.1..1", "rho=0.2,0.3"], "name each thing once"),
        (["roh=0.1..1"], "'roh' is unknown; did you mean 'rho'?"),
        (["epochs=2,4"], "epochs is the same for all trials"),
        (["width=2,4"], "width is the same for all trials"),
        (["lr=-1..1:linear"], "lr=-1..1:linear: lr=-1.0: the learning rate must be"),
    ],
)
def test_a_wrong_word_is_answered_with_what_was_meant(words: list[str], answer: str) -> None:
    with pytest.raises(ValueError, match="^search") as error:
        spaces(recipe(), words, baseline=True)
    assert answer in str(error.value)


def test_a_grid_needs_values() -> None:
    assert grid([Listed("a", (1, 2)), Listed("b", ("x",))]) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    with pytest.raises(ValueError, match=r"rho=0.1..1 is a range, and a grid needs its values"):
        grid([Range("rho", 0.1, 1.0, log=True)])


def test_by_default_each_method_is_searched_around_its_own_rho_and_the_base_is_the_level() -> None:
    base, sam, asam = spaces(recipe(methods=("sam", "asam")), [], baseline=True)
    assert (base.recipe.methods, base.dimensions) == (("sgd",), ())
    assert (sam.recipe.methods, sam.dimensions) == (("sam",), (Range("rho", 0.005, 0.5, log=True),))
    assert asam.dimensions == (Range("rho", 0.05, 5.0, log=True),)
    assert [space.usual() for space in (sam, asam)] == [{"rho": 0.05}, {"rho": 0.5}]
    assert len(spaces(recipe(methods=("sam",)), [], baseline=False)) == 1


def test_options_of_the_recipe_are_searched_for_the_base_too() -> None:
    base, look = spaces(recipe(methods=("looksam:k=4",)), ["lr=0.01..0.1", "k=2..8", "rho=0.1,0.2"], baseline=True)
    assert [d.name for d in base.dimensions] == ["lr"]
    assert [d.name for d in look.dimensions] == ["lr", "k", "rho"]
    at = look.at({"lr": 0.02, "k": 3, "rho": 0.1})
    assert (at.lr, at.methods) == (0.02, ("looksam:rho=0.1,k=3",))


def test_all_contenders_are_tuned_with_the_momentum_that_they_are_compared_with() -> None:
    momenta = {space.recipe.base_momentum for space in spaces(recipe(methods=("sgd", "msam")), [], baseline=True)}
    assert momenta == {0.9}


# --- by which images ---


class Untouchable(Dataset):
    """A data set whose test set must not be looked at."""

    @property
    def test(self) -> data.Split:  # type: ignore[override]
        raise AssertionError("the test set was read")


def untouchable() -> Dataset:
    whole, made = dataset(train=144), object.__new__(Untouchable)
    for name in ("name", "train", "source"):
        object.__setattr__(made, name, getattr(whole, name))
    return made


def test_the_validation_set_is_disjoint_balanced_and_always_the_same() -> None:
    given = data.load("sample")
    one, two = hold_out(given, 6), hold_out(given, 6)
    assert torch.equal(one.test.images, two.test.images)
    assert len(one.train) == 2500
    assert one.test.labels.bincount().tolist() == [50] * 10
    # they are the training images, each once
    rows = torch.cat([one.train.images, one.test.images]).flatten(1).unique(dim=0)
    assert torch.equal(rows, given.train.images.flatten(1).unique(dim=0))
    assert len(one.train) + len(one.test) == len(given.train)
    with pytest.raises(ExperimentError, match="none can be held out"):
        hold_out(dataset(train=10), 60)


# --- a search ---


def command(out: Path, **fields: object) -> list[str]:
    given = {"methods": "sgd sam", "epochs": 2, "seeds": 2, "trials": 8, "checkpoint_seconds": 0, "out": out}
    return ["tune", "demo", *options(**(given | fields))]


def tuned(words: list[str], monkeypatch: pytest.MonkeyPatch | None = None) -> int:
    if monkeypatch is None:
        return command_line(words)
    monkeypatch.setattr(data, "load", lambda *_: untouchable())
    from steppe.cli import main

    return main(words)


def trials(out: Path) -> list[dict[str, object]]:
    results = [Result.from_json(json.loads(line)) for line in (out / "trials.jsonl").read_text().splitlines()]
    return [vars(result) | {"runs": untimed(list(result.runs))} for result in results]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    patch = pytest.MonkeyPatch()
    threads = torch.get_num_threads()
    assert tuned(command(out), patch) == 0
    patch.undo()
    torch.set_num_threads(threads)
    return out


def test_a_search_never_reads_the_test_set_and_leaves_a_complete_folder(undisturbed: Path) -> None:
    found = trials(undisturbed)  # the fixture's test set raises when it is touched
    assert [(t["method"], t["number"]) for t in found] == [("sgd", 0), *(("sam", n) for n in range(8))]
    assert {t["state"] for t in found} == {"complete"}
    values = [t["values"]["rho"] for t in found[1:]]  # type: ignore[index]
    assert values[0] == 0.05  # the usual one comes first
    assert len(set(values)) == 8
    assert all(0.005 <= value <= 0.5 for value in values)
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.iterdir()}
    assert names >= {"config.json", "environment.json", "study.db", "trials.jsonl", "summary.md", "summary.json"}
    assert {path.name for path in (undisturbed / "figures").iterdir()} == {"rho.png", "rho.svg"}
    summary = (undisturbed / "summary.md").read_text()
    assert "The test set was not touched" in summary
    assert "steppe compare demo --methods sgd sam:rho=" in summary
    (run,) = (undisturbed / "trials" / "sam-000" / "runs").glob("*seed1")
    assert read_records((run / "metrics.jsonl").read_text())[-1].standardized_epoch == 2


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_to_the_same_trials(undisturbed: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(1)
    program = (
        f"import sys; sys.path.insert(0, {str(TINY.parent)!r}); import test_tune, pytest; "
        f"sys.exit(test_tune.tuned(sys.argv[1:], pytest.MonkeyPatch()))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, *command(out)], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 90
    while len(list(out.glob("trials/*/runs/*/checkpoint.pt"))) < 8:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    patch = pytest.MonkeyPatch()
    with patch.context():
        assert tuned(command(out), patch) == 0
    patch.undo()
    assert trials(out) == trials(undisturbed)
    assert sorted(p.name for p in (out / "trials").iterdir()) == sorted(
        p.name for p in (undisturbed / "trials").iterdir()
    )


def test_trials_can_be_added_but_nothing_else_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"sampler": "grid", "search": "rho=0.02,0.2,2", "seeds": 1}
    assert tuned(command(tmp_path / "run", **fields, trials=2)) == 0
    before = trials(tmp_path / "run")
    assert [t["values"] for t in before] == [{}, {"rho": 0.02}, {"rho": 0.2}]
    assert tuned(command(tmp_path / "run", **fields, trials=9)) == 0
    after = trials(tmp_path / "run")
    assert after[:3] == before
    assert [t["values"] for t in after[3:]] == [{"rho": 2.0}]
    capsys.readouterr()
    assert tuned(command(tmp_path / "run", **fields, trials=9, lr=0.2)) == 1
    assert "lr was 0.05 and is 0.2" in capsys.readouterr().err
    assert command_line(["compare", *options(out=tmp_path / "run")]) == 1
    assert "choose another folder with --out" in capsys.readouterr().err
    made = [tmp_path / "run" / name for name in ("summary.md", "summary.json", "figures/rho.png", "figures/rho.svg")]
    content = [path.read_bytes() for path in made]
    for path in (*made, tmp_path / "run" / "study.db"):
        path.unlink()
    assert command_line(["plot", str(tmp_path / "run")]) == 0  # from the folder alone, without Optuna
    assert [path.read_bytes() for path in made] == content


def test_a_trial_that_diverges_is_the_worst_and_ends_nothing(tmp_path: Path) -> None:
    fields = {"sampler": "grid", "search": "lr=0.05,1e30", "seeds": 1, "methods": "sgd"}
    assert tuned(command(tmp_path / "run", **fields)) == 0
    good, bad = trials(tmp_path / "run")
    assert (good["state"], bad["state"]) == ("complete", "diverged")
    assert "diverged in epoch 1" in str(bad["reason"])
    assert (
        "Diverged, and counted as worse than all others: sgd trial 1 (lr 1e+30)"
        in (tmp_path / "run" / "summary.md").read_text()
    )


def test_a_shared_storage_shares_the_trials(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    fields = {"seeds": 1, "storage": storage, "sampler": "random"}
    assert tuned(command(tmp_path / "one", **fields, trials=2)) == 0
    assert tuned(command(tmp_path / "two", **fields, trials=3)) == 0
    one, two = trials(tmp_path / "one"), trials(tmp_path / "two")
    assert two[:3] == one
    assert [path.name for path in (tmp_path / "two" / "trials").iterdir()] == ["sam-002"]


@pytest.mark.slow
def test_trials_run_on_ray_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := MadeUp(sam_rho_0_05_seed1=1))
    fields = {"sampler": "grid", "search": "rho=0.02,0.05"}
    assert tuned(command(tmp_path / "here", **fields), monkeypatch) == 0
    assert tuned(command(tmp_path / "ray", **fields, on="ray"), monkeypatch) == 0
    assert ray.most == 2  # of several trials at a time
    assert trials(tmp_path / "ray") == trials(tmp_path / "here")


class Eager(InProcess):
    """Takes all the jobs that it may before it trains the first."""

    def __init__(self, recipe: Recipe, most: int, console: object) -> None:
        super().__init__(recipe, CPU)
        self.most, self.taken = most, list[int]()
        Eager.last = self

    last: "Eager"

    def __enter__(self) -> "Eager":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, jobs: Iterable[Job], *rest: Any) -> Generator[Outcome, None, None]:
        given = list(jobs)
        self.taken.append(len(given))
        yield from super().run(given, *rest)


@pytest.mark.parametrize(
    ("words", "taken"),
    [({"sampler": "tpe"}, [2, 2, 2]), ({"sampler": "tpe", "runs_at_once": 4}, [6]), ({"sampler": "random"}, [6])],
)
def test_a_sampler_that_learns_waits_for_each_trial_unless_told_otherwise(
    words: dict[str, object], taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steppe.experiments.execution.local.Processes", Eager)
    monkeypatch.setattr("steppe.experiments.data.datasets.load", lambda name, data_dir=None: dataset())
    monkeypatch.setattr("steppe.experiments.tuning.tune.draw", lambda *_: None)
    monkeypatch.setattr("steppe.experiments.execution.cpus.available", lambda: 4)
    fields = {"out": tmp_path / "run", "methods": "sam", "seeds": 2, "epochs": 1, "eval_every": 1, "trials": 3}
    assert main(["tune", "demo", *options(**fields, **words), "--no-baseline"]) == 0
    assert Eager.last.taken == taken
    assert Eager.last.most == (2 if taken[0] == 2 else 4)  # the runs of a trial, or all that there is room for


def test_a_trial_belongs_to_who_holds_it_and_is_taken_up_again(tmp_path: Path) -> None:
    (space,) = spaces(recipe(methods=("sam",)), [], baseline=False)

    def study(storage: optuna.storages.BaseStorage) -> Study:
        given = {"name": "one", "config": "{}", "maximize": True, "sampler": "tpe", "seed": 0, "trials": 3, "run": None}
        return Study(space, storage, tmp_path, **given)  # type: ignore[arg-type]

    with opened(None, tmp_path) as storage, opened(None, tmp_path) as other:
        mine, theirs = study(storage), study(other)
        one, two = mine.take(), theirs.take()
        assert one is not None
        assert two is not None
        assert (one.number, two.number) == (0, 1)
        assert one.recipe != two.recipe
        two.lock.close()  # as the kernel does when its process is killed
        again, three = mine.take(), mine.take()
        assert again is not None
        assert three is not None
        assert (again.number, three.number) == (1, 2)
        assert again.recipe == two.recipe
        assert theirs.take() is None  # the others are held, and there are no more than three
        for trial in (one, again, three):
            trial.lock.close()


def test_a_storage_that_cannot_be_opened_is_one_line_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned(command(tmp_path / "run", storage="nosuchdb://me:secret@host/db")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--storage nosuchdb://... cannot be opened" in error
    assert "secret" not in error


def test_a_missing_optuna_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert command_line(command(tmp_path / "run")) == 1
    assert capsys.readouterr().err.endswith(
        "optuna is not installed, and steppe tune needs it: pip install 'steppe[tune]'\n"
    )


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--search", "roh=0.1..1"], "did you mean 'rho'?"),
        (["--sampler", "grid"], "a grid needs its values"),
        (["--hold-out", "1"], "at least 2"),
        (["--trials", "0"], "at least 1"),
    ],
)
def test_a_wrong_search_is_answered_before_anything_is_done(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line(["tune", *words])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert answer in " ".join(re.sub(r"[│╭╮╰╯─]", " ", captured.out + captured.err).split())


# --- what it found ---


def result(number: int, rho: float, *accuracies: float, method: str = "sam") -> Result:
    runs = tuple(Record(4, 2, 10, 100, 2.0, 0.1, 99.0, 0.5, a, 99.0 - a, 1.0, 1.0) for a in accuracies)
    values = {"rho": rho} if method != "sgd" else {}
    return Result(method, number, values, "complete", runs)


def findings(*results: Result, low: float = 0.01, high: float = 1.0, **fields: object) -> Findings:
    given = recipe(**({"seeds": 3} | fields))
    found = spaces(given, [f"rho={low}..{high}"], baseline=True)
    return find(Tuning(given, found, "accuracy", 6, Path("runs/demo-tune")), results)


def test_the_best_is_named_with_what_is_as_good() -> None:
    told = findings(
        result(0, 0.0, 80.0, 81.0, 82.0, method="sgd"),
        result(0, 0.05, 84.0, 85.0, 86.0),
        result(1, 0.1, 84.2, 85.2, 86.2),
        result(2, 0.02, 82.0, 83.0, 84.0),
        result(3, 0.5, 60.0, 70.0, 80.0),
    )
    assert [best.result.number for best in told.best] == [0, 1]
    text = "\n".join(told.notes)
    # the spread of the better half is 1 point a run
    assert "SAM (rho 0.1): 85.20±1.00 %, the best of 4 trials (trial 1)." in text
    assert "2 of 4 trials are within one standard error (0.58 points) of the best: rho 0.05, 0.1." in text
    assert "The optimum is flat" in text
    assert "SAM (rho 0.1) against SGD, on the images it was chosen by: +4.2 points, 95 % interval [+4.2, +4.2]" in text
    assert not told.warnings
    assert json.loads(json.dumps(told.json()))["best"][1]["spec"] == "sam:rho=0.1"


@pytest.mark.parametrize(
    ("rho", "warning"),
    [
        (0.98, "the best rho, 0.98, lies at the upper edge of rho=0.01..1, .* --search rho=0.1..10"),
        (0.01, "lies at the lower edge .* --search rho=0.001..0.1"),
        (0.7, None),
    ],
)
def test_a_best_at_the_edge_is_warned_of(rho: float, warning: str | None) -> None:
    told = findings(result(0, 0.1, 80.0, 81.0, 82.0), result(1, rho, 84.0, 85.0, 86.0))
    assert bool(told.warnings) == (warning is not None)
    if warning is not None:
        with pytest.raises(Warning, match=warning):
            raise Warning(told.warnings[0])


def test_one_run_a_trial_gives_no_verdict() -> None:
    text = "\n".join(findings(result(0, 0.1, 80.0), result(1, 0.2, 84.0), seeds=1).notes)
    assert "take --seeds 3 or more" in text
    assert "within one standard error" not in text


def test_the_command_confirms_on_fresh_seeds_and_is_understood() -> None:
    told = findings(result(0, 0.0, 80.0, 81.0, 82.0, method="sgd"), result(0, 0.123, 84.0, 85.0, 86.0))
    (line,) = told.commands
    verb = parse(line.split()[1:])
    assert isinstance(verb, Compare)
    assert verb.recipe.methods == ("sgd", "sam:rho=0.123")
    assert (verb.recipe.first_seed, verb.recipe.seeds, verb.recipe.width) == (3, 3, 2)
    assert verb.recipe.out == Path("runs/demo-tune-confirmed")


def test_any_recipe_can_be_written_as_a_command() -> None:
    given = recipe(methods=("sgd", "looksam:rho=0.1,k=3"), amp=True, channels_last=False, momentum=0.5, seeds=3)
    verb = parse(confirm(given).split()[1:])
    assert isinstance(verb, Compare)
    assert verb.recipe == given


def test_contenders_with_other_options_are_confirmed_each_by_itself() -> None:
    given = recipe(seeds=3)
    found = spaces(given, ["lr=0.01,0.1"], baseline=True)
    runs = result(0, 0.1, 80.0, 81.0, 82.0).runs
    results = [Result("sgd", 0, {"lr": 0.1}, "complete", runs), Result("sam", 0, {"lr": 0.01}, "complete", runs)]
    one, two = find(Tuning(given, found, "accuracy", 6, Path("runs/x")), results).commands
    assert "--methods sgd " in one
    assert "--lr 0.1" in one
    assert "--methods sam " in two
    assert "--lr 0.01" in two
    assert one.split()[-1] != two.split()[-1]


def test_a_password_is_kept_out_of_the_record() -> None:
    assert tune._without_password("mysql://me:secret@host/db") == "mysql://me:***@host/db"
