"""benchmarks/gpu: a list that fails piece by piece, is cut anywhere, and goes on on another machine."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from gpu import carry, child, correctness, place, plan, rehearsal, run, table, train  # noqa: E402
from gpu.plan import Piece, Training  # noqa: E402
from results import Result  # noqa: E402
from steppe.experiments.config.method_spec import parse  # noqa: E402
from steppe.experiments.config.recipe import Recipe  # noqa: E402
from steppe.experiments.errors import ExperimentError  # noqa: E402
from steppe.experiments.training.stopping import Stop, Stopped  # noqa: E402

NOT_THERE = ("tyro", "plotly", "ray", "optuna", "expecttest", "selenium", "tensorboard", "lightning")
"""What nobody has to install on a machine with a GPU."""


def arguments(folder: Path, **others: object) -> argparse.Namespace:
    options = {
        "device": "cpu",
        "tiny": True,
        "machine": "one",
        "data": None,
        "again": False,
        "only": None,
        "cut": False,
    }
    places = {"results": folder / "results", "state": folder / "state", "minutes": 60.0, "classic": None, "peers": None}
    return argparse.Namespace(**(options | places | others))


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Children that find none of NOT_THERE."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Not:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {NOT_THERE}:\n"
        "            raise ImportError(f'{name} is not there')\n"
        "sys.meta_path.insert(0, Not())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    done = subprocess.run([sys.executable, "-c", "import tyro"], capture_output=True, text=True, check=False)
    assert "tyro is not there" in done.stderr


def untimed(runs):
    """Runs without what no two of them share."""
    for one in runs:
        for record in one["records"]:
            del record["seconds"], record["images_per_second"]
        for measured in one.get("flatness", {}).values():
            del measured["seconds"]
    return runs


# Training: cut, carried to another machine, and gone on with.


@pytest.mark.slow
@pytest.mark.usefixtures("bare")
def test_a_rehearsal_with_a_cut_ends_with_the_bits_of_a_training_without_one(tmp_path, capsys):
    assert rehearsal.rehearse(["article-0"], out=tmp_path / "kept") == 0
    said = capsys.readouterr().out
    assert "article-0: not finished" in said
    assert "| SAM | 3 | 2.00 |" in said, "it is rendered"
    assert "1 of 1 pieces, 2 figures" in said
    found = json.loads((tmp_path / "kept" / "a-rehearsal" / "article-0.json").read_text())
    assert found["command"] == "python benchmarks/gpu/run.py --only article-0"
    assert found["data"]["calls"] == 2, "it was stopped once"
    straight = train.Runs("article-0", train.tiny(known("article-0")), place.Place(arguments(tmp_path)))
    straight.train()
    expected = straight.result()
    assert untimed(found["data"]["runs"]) == untimed(expected["runs"])
    assert found["data"]["recipes"] == expected["recipes"]
    sgd, sam = expected["runs"]
    assert (list(sgd["flatness"]), list(sam["flatness"])) == (["2"], ["2", "3"]), "at equal compute and at the end"
    assert sam["flatness"]["2"]["measures"]["lambda_max"] != sam["flatness"]["3"]["measures"]["lambda_max"]
    assert not list(straight.folder.rglob("checkpoint.pt")), "weights are dropped when all is known of them"


def known(name: str) -> Training:
    (training,) = [piece.training for piece in plan.pieces() if piece.name == name]
    return training


def test_flatness_is_that_of_the_weights_after_equal_compute(tmp_path):
    """Measured on the way to the third epoch, it is that of a run that ends after the second."""
    longer = train.tiny(replace(known("article-0"), methods=("sam",)))
    found = []
    for name, training in (("longer", longer), ("shorter", replace(longer, extra_epochs=0))):
        runs = train.Runs(name, training, place.Place(arguments(tmp_path)))
        runs.train()
        found.append(runs.result()["runs"][0]["flatness"]["2"]["measures"])
    assert found[0] == found[1]


@pytest.mark.parametrize("lost", [False, True])
def test_a_cut_where_flatness_is_due_loses_nothing(tmp_path, monkeypatch, lost):
    """Nor does a checkpoint that was left behind, but time."""

    def cut(*args, **kwargs):
        raise Stopped(signal.SIGTERM)

    training = train.tiny(replace(known("article-0"), methods=("sam",)))
    at = place.Place(arguments(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(train, "flatness", cut)
        with pytest.raises(Stopped):
            train.Runs("cut", training, at).train()
    (checkpoint,) = (at.state / "cut").rglob("checkpoint.pt")
    if lost:
        checkpoint.unlink()
    found = []
    for name in ("cut", "straight"):
        runs = train.Runs(name, training, at)
        runs.train()
        found.append(untimed(runs.result()["runs"]))
    assert found[0] == found[1]
    assert "failed" not in str(found[0])


def test_a_run_that_cannot_be_trained_does_not_stop_the_others(tmp_path, monkeypatch):
    runs = train.Runs("two", train.tiny(Training(("sgd", "sam"))), place.Place(arguments(tmp_path)))
    real = train.train

    def fails(run, *args):
        if run.method == "sgd":
            raise ExperimentError("it diverged")
        return real(run, *args)

    monkeypatch.setattr(train, "train", fails)
    runs.train()
    sgd, sam = runs.result()["runs"]
    assert sgd["failed"] == "it diverged"
    assert [record["standardized_epoch"] for record in sam["records"]] == [1, 2]


def test_the_fastest_loop_that_works_is_taken_and_kept(tmp_path):
    at = place.Place(arguments(tmp_path, tiny=False))

    def begun(name: str) -> dict:
        return train.Runs(name, Training(), at).begun["configuration"]

    assert begun("nothing known") == {"channels_last": True}
    fastest = {"amp": True, "channels_last": False, "compile": False, "cuda_graphs": True, "fused": True}
    write(at, "loop", {"fastest": fastest})
    first = begun("article-0")
    assert first == {"amp": True, "channels_last": False, "cuda_graphs": True}
    write(at, "loop", {"fastest": {**fastest, "amp": False, "compile": True, "cuda_graphs": False}})
    assert begun("article-0") == first, "or a checkpoint would be lost"
    assert begun("article-1") == {"amp": False, "channels_last": False}, "graphs were left out for the compiler's sake"
    (at.state / "article-0" / train.PLAIN).touch()
    plain = begun("article-0")
    assert plain == {"amp": False, "channels_last": False, "cuda_graphs": False}
    write(at, "loop", {"fastest": None})
    assert begun("article-0") == plain


def test_epochs_are_those_that_there_is_time_for(tmp_path):
    at = place.Place(arguments(tmp_path, tiny=False))
    ends = [
        {"records": [{"seconds": 75.0, "standardized_epoch": 150}]},
        {"records": [{"seconds": 625.0, "standardized_epoch": 200}]},
    ]
    training = Training(("sgd", "sam"), minutes=10, eval_every=10)  # two seconds a pass: 300 passes, 150 each
    write(at, "article-0", {"runs": ends})
    assert train.Runs("enough", training, at).begun["epochs"] == 150
    fewer = train.Runs("fewer", replace(training, methods=("sgd", "sam", "asam")), at).begun
    assert fewer["epochs"] == 100
    assert "100 of 150 standardized epochs, for 10 minutes at 2 s a pass" in fewer["fewer"]
    write(at, "fewer", fewer)
    assert train.Runs("like", replace(training, like="fewer"), at).begun["epochs"] == 100


def test_presets_are_trained_as_they_are_written(monkeypatch):
    assert plan.pieces()[-1].training.methods[:2] == ("sgd", "sam")
    assert plan.pieces()[-1].training.methods[2:] == plan.PRESETS
    monkeypatch.setattr(plan, "PRESETS", ("preset:rho=0.1,k=5",))
    (piece,) = [piece for piece in plan.pieces() if piece.name == "presets"]
    train.register()
    assert [parse(method).passes for method in piece.training.methods] == [1, 2, pytest.approx(1.2)]


def write(at: place.Place, name: str, data: object) -> None:
    at.folder.mkdir(parents=True, exist_ok=True)
    (at.folder / f"{name}.json").write_text(json.dumps({"tiny": at.arguments.tiny, "data": data}))


# The list.

GOOD = "import json, sys, pathlib\npathlib.Path(sys.argv[1]).write_text(json.dumps({'tiny': True, 'data': {}}))\n"


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A function that makes a list of scripts, and one that calls the command on it."""
    scripts = tmp_path / "scripts"
    at = place.Place(arguments(tmp_path))
    at.folder.mkdir(parents=True)
    monkeypatch.setattr(run, "BENCHMARKS", scripts)
    monkeypatch.setattr(plan, "BENCHMARKS", scripts)
    monkeypatch.setattr(Piece, "code", property(lambda piece: [scripts / piece.script]))
    monkeypatch.setattr(place, "ROOT", tmp_path)
    monkeypatch.setattr(child, "GRACE", 0.5)

    def made(**texts: str) -> None:
        pieces = []
        for name, text in texts.items():
            (scripts / name).mkdir(parents=True, exist_ok=True)
            (scripts / name / "run.py").write_text(text)
            out = (str(at.folder / f"{name}.json"), str(at.state / name))
            training = Training() if name.startswith("training") else None
            pieces.append(Piece(name, f"the {name}", f"{name}/run.py", 0.03, out, training))
        monkeypatch.setattr(run, "pieces", lambda: pieces)

    def called(**others: object) -> None:
        run.Call(arguments(tmp_path, **others), Stop()).run()

    return made, called, at


def test_a_piece_that_fails_does_not_stop_the_others_and_is_told(listed, capsys):
    made, called, at = listed
    made(bad="print('so far'); raise SystemExit('no memory')", empty="", good=GOOD)
    called()
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["bad", "empty", "good"]
    assert "failed after 0 s: exit status 1" in said[0]
    assert "it ended without a result" in said[1]
    assert "done" in said[2]
    command = json.loads((at.folder / "good.json").read_text())["command"]
    assert command.startswith("python benchmarks/good/run.py"), "and not where it lies here"
    assert "--results" not in command
    assert at.failure("bad")["log"] == ["so far", "no memory"]
    run.Call(arguments(at.state.parent), Stop()).show()
    assert "failed  bad          the bad: exit status 1" in capsys.readouterr().out


def test_what_failed_is_tried_again_when_its_code_has_changed_or_on_request(listed, capsys):
    made, called, at = listed
    made(bad="raise SystemExit(3)", good=GOOD)
    called()
    capsys.readouterr()
    called()
    assert capsys.readouterr().out == ""
    called(again=True)
    assert capsys.readouterr().out.startswith("bad: failed")
    made(bad=GOOD, good="raise SystemExit('it was done')")
    called()
    assert capsys.readouterr().out.startswith("bad: done")
    assert at.failure("bad") is None


def test_what_a_failed_training_left_is_not_gone_on_with(listed):
    made, called, at = listed
    made(training="raise SystemExit(1)")
    called()
    assert (at.state / "training" / train.PLAIN).exists()
    made(training=f"import sys, pathlib\nassert not pathlib.Path(sys.argv[2], '{train.PLAIN}').exists()\n{GOOD}")
    called()
    assert at.result("training") == {}


def test_what_takes_too_long_is_ended_and_what_there_is_no_time_for_is_put_off(listed, capsys):
    made, called, _ = listed
    made(slow="import time; time.sleep(60)", good=GOOD)
    called()
    said = capsys.readouterr().out
    assert "it took longer than 0.03 minutes" in said
    assert "good: done" in said
    made(late=GOOD)
    called(minutes=run.RESERVE / 60)
    assert "late: put off" in capsys.readouterr().out


def test_a_training_that_is_stopped_goes_on_and_one_that_is_stuck_fails(listed, capsys, monkeypatch):
    made, called, at = listed
    saves = "import sys, pathlib\nplace = pathlib.Path(sys.argv[2], 'runs')\nplace.mkdir(parents=True)\n"
    made(training=f"{saves}(place / 'a').touch()\nsys.exit({train.GOES_ON})", good=GOOD)
    monkeypatch.setattr(run, "STUCK", 0.0)
    called()
    assert "training: not finished" in capsys.readouterr().out, "and the time is up for the others"
    assert run.Call(arguments(at.state.parent), Stop()).stands(run.pieces()[0]) == "begun"
    made(training="import time; time.sleep(60)", good=GOOD)
    called()
    said = capsys.readouterr().out
    assert "failed (it saved nothing in" in said
    assert "once more, without CUDA graphs" in said
    assert "training: failed after" in said
    assert "good: done" in said


def test_a_training_that_fails_is_tried_without_what_may_not_work(listed, capsys):
    made, called, _ = listed
    plain = f"import sys, pathlib\nif not pathlib.Path(sys.argv[2], '{train.PLAIN}').exists(): sys.exit(1)\n"
    made(training=plain + GOOD)
    called()
    said = capsys.readouterr().out
    assert "training: failed (exit status 1); once more, without CUDA graphs" in said
    assert "training: done" in said


def test_a_signal_stops_the_call(listed, capsys, tmp_path):
    made, _, _ = listed
    made(slow="import time; time.sleep(60)", good=GOOD)
    stop = Stop()
    stop.signal = signal.SIGTERM
    run.Call(arguments(tmp_path), stop).run()
    assert capsys.readouterr().out.startswith("slow: stopped")


# Processes.

DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


def test_a_process_that_does_not_listen_is_killed_with_all_that_it_has_started(tmp_path):
    ended = child.run([sys.executable, "-c", DEAF], tmp_path / "log", 1.0, Stop(), grace=0.5)
    assert (ended.status, ended.asked) == (-signal.SIGKILL, True)
    for _ in range(50):
        if not alive(int((tmp_path / "log").read_text())):
            return
        time.sleep(0.1)
    pytest.fail("its child is still there")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_finds_this_checkout_and_may_end_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "first")
    words = [sys.executable, "-c", "import os; print(os.environ['PYTHONPATH']); raise SystemExit(7)"]
    ended = child.run(words, tmp_path / "log", 30.0, Stop())
    assert (ended.status, ended.asked) == (7, False)
    assert (tmp_path / "log").read_text().strip() == f"first{os.pathsep}{ROOT / 'src'}"


# Carrying.


@pytest.fixture
def machine(tmp_path):
    """A device's results, and a state with two checkpoints."""
    state, results = tmp_path / "state", tmp_path / "results" / "one"
    for path, content in {
        results / "loop.json": b"{}",
        state / "a" / "begun.json": b"a",
        state / "a" / "checkpoint.pt": os.urandom(3 << 20),
        state / "b" / "checkpoint.pt": os.urandom(2 << 20),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    carry.count(state)
    return state, results


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_carried_comes_back_whole(machine, tmp_path):
    state, results = machine
    assert carry.collect(state, results, tmp_path / "out", ["a", "b"], piece=1 << 20, total=12 << 20) == []
    sizes = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert len(sizes) == 8
    assert max(sizes) <= 1 << 20
    assert carry.bring_back(tmp_path / "out", tmp_path / "there", tmp_path / "found")
    assert contents(tmp_path / "there") == contents(state)
    assert contents(tmp_path / "found") == {"one/loop.json": b"{}"}
    assert not carry.bring_back(tmp_path / "out", tmp_path / "there", tmp_path / "found"), "it is as new"
    carry.count(state)
    carry.collect(state, results, tmp_path / "out", ["a", "b"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "results.tar.gz", "state.tar.0"]
    (tmp_path / "there" / "old").touch()
    assert carry.bring_back(tmp_path / "out", tmp_path / "there", tmp_path / "found")
    assert contents(tmp_path / "there") == contents(state)


@pytest.mark.parametrize(("order", "kept"), [("ab", "a"), ("ba", "b")])
def test_what_there_is_no_room_for_is_the_least_valuable(machine, tmp_path, order, kept):
    state, results = machine
    left = carry.collect(state, results, tmp_path / "out", list(order), total=4 << 20)
    assert [name.split("/")[0] for name in left] == [order[1]]
    carry.bring_back(tmp_path / "out", tmp_path / "there", tmp_path / "found")
    assert set(contents(tmp_path / "there")) == {"serial", "a/begun.json", f"{kept}/checkpoint.pt"}
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 4 << 20


@pytest.mark.parametrize("harm", ["missing", "damaged", "no manifest", "other manifest", "not json"])
def test_what_is_not_whole_is_refused_and_nothing_is_written(machine, tmp_path, harm):
    state, results = machine
    out = tmp_path / "out"
    carry.collect(state, results, out, ["a", "b"], piece=1 << 20, total=12 << 20)
    if harm == "missing":
        (out / "state.tar.3").unlink()
    elif harm == "damaged":
        content = bytearray((out / "state.tar.3").read_bytes())
        content[1000] ^= 1
        (out / "state.tar.3").write_bytes(content)
    elif harm == "no manifest":
        (out / "manifest.json").unlink()
    else:
        (out / "manifest.json").write_text('{"format": "another"}' if harm == "other manifest" else "{")
    named = "state.tar.3" if harm in ("missing", "damaged") else "manifest.json"
    with pytest.raises(ExperimentError, match=rf"{named}.*Bring .* back as --out wrote it"):
        carry.bring_back(out, tmp_path / "there", tmp_path / "found")
    assert not (tmp_path / "there").exists()
    assert not (tmp_path / "found").exists()
    words = ["--from", str(out), "--state", str(tmp_path / "there"), "--results", str(tmp_path / "found"), "--list"]
    assert run.main(["--device", "cpu", "--machine", "one", *words]) == 1


# Correctness and tables.


def test_correctness_counts_and_keeps_the_last_lines(tmp_path, monkeypatch):
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.skip\ndef test_not_here(): pass\n"
        "def test_bad(): assert 1 + 1 == 3, 'sums'\n"
        "@pytest.fixture\ndef broken(): raise OSError('no device')\n"
        "def test_worse(broken): pass\n"
    )
    monkeypatch.setattr(correctness, "OWN", file)
    monkeypatch.setattr(correctness, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cuda.py").write_text("import nothing_of_that_name\n")  # a file that cannot be read
    monkeypatch.delitem(sys.modules, "test_cuda", raising=False)  # the real one, where this process has run it
    monkeypatch.setenv("STEPPE_DEVICE", "")
    places = ["--results", str(tmp_path / "results"), "--machine", "one", "--device", "cpu", "--tiny"]
    monkeypatch.setattr(sys, "argv", ["correctness.py", *places])
    assert correctness.main() == 0
    data = json.loads((tmp_path / "results" / "one" / "correctness.json").read_text())["data"]
    assert {name: data[name] for name in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 3, "skipped": 1}
    monkeypatch.delitem(sys.modules, "test_cuda", raising=False)
    (tmp_path / "tests" / "test_cuda.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["correctness.py", *places])
    assert correctness.main() == 0
    data = json.loads((tmp_path / "results" / "one" / "correctness.json").read_text())["data"]
    assert data["files"] == {"test_three.py": {"passed": 1, "skipped": 1, "failed": 2}}
    assert [failure["test"] for failure in data["failures"]] == ["test_three.py::test_bad", "test_three.py::test_worse"]
    text = table.correctness([result("correctness", data)])
    assert "| **all** | 1 | 2 | 1 |" in text
    assert "Failed: `test_three.py::test_worse`: `OSError: no device`" in text


def result(name: str, data: object, *, on_gpu: bool = False) -> Result:
    return Result(name, "a device", on_gpu, "2026-11-23", "python run.py", "2.13.0", {}, data)


def test_precision_is_compared_pair_by_pair():
    record = {"standardized_epoch": 2, "epoch": 2, "steps": 1, "gradient_evaluations": 1, "passes": 1.0}
    record |= {"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 1.0, "seconds": 1.0, "images_per_second": 1.0}
    tests = {
        ("bfloat16", 0): 90.0,
        ("bfloat16", 1): 92.0,
        ("float32", 0): 89.5,
        ("float32", 1): 91.5,
        ("float32", 2): 10.0,
    }
    runs = [
        {"way": way, "method": "sgd", "seed": seed, "records": [record | {"test_accuracy": test, "gap": 99.0 - test}]}
        for (way, seed), test in tests.items()
    ]
    runs.append({"way": "bfloat16", "method": "sgd", "seed": 2, "failed": "it diverged"})
    recipes = {way: Recipe(methods=("sgd",), seeds=3, epochs=2).to_json() for way in ("bfloat16", "float32")}
    text = table.precision([result("precision", {"recipes": recipes, "runs": runs, "wall": 60.0, "fewer": None})])
    assert (
        "| SGD | 91.00±1.41 | 90.50±1.41 | +0.50 [+0.50, +0.50] | 8.00±1.41 | 8.50±1.41 | -0.50 [-0.50, -0.50] | 2 |"
        in text
    )
    assert "After 2 standardized epochs, 2 of 2 differences are beyond their 95 % interval." in text
    assert "- Failed: sgd-seed2: it diverged" in text
