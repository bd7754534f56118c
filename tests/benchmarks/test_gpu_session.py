"""benchmarks/gpu/session.py: measurements in order, failures that stop nothing else, time limits and resuming."""

import json
import re
import signal

import pytest
from gpu_support import arguments

from gpu import device_results, measurements, process, run, session
from gpu.device_results import DeviceResults
from gpu.measurements import UNFINISHED, WITHOUT_GRAPHS, Measurement, Training
from gpu.session import Session
from steppe.experiments.training.stopping import Stop

HEADER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
name = pathlib.Path(__file__).parent.name
training = folder / "in_progress" / name
"""

GOOD = """
result = {'tiny': True, 'data': {}, 'command': sys.argv[sys.argv.index('--command') + 1]}
(folder / f'{name}.json').write_text(json.dumps(result))
"""


@pytest.fixture
def device(tmp_path, monkeypatch):
    """The results of a device, and measurements whose scripts are in a temporary folder."""
    scripts = tmp_path / "scripts"
    found = DeviceResults(arguments(tmp_path))
    found.folder.mkdir(parents=True)
    monkeypatch.setattr(session, "BENCHMARKS", scripts)
    monkeypatch.setattr(device_results, "ROOT", tmp_path)
    monkeypatch.setattr(Measurement, "code", property(lambda measurement: [scripts / measurement.script]))
    monkeypatch.setattr(process, "GRACE", 0.5)
    monkeypatch.setattr(process, "_POLL_INTERVAL", 0.02)
    return found


@pytest.fixture
def write_scripts(device, monkeypatch):
    """A function that writes the scripts of a list of measurements."""

    def write(**scripts: str) -> None:
        found = []
        for name, text in scripts.items():
            path = session.BENCHMARKS / name / "run.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(HEADER + text)
            training = Training() if name.startswith("training") else None
            minutes = 0.01 if "sleep(60)" in text else 5
            found.append(
                Measurement(name, f"the {name}", f"{name}/run.py", minutes, (str(device.folder),), training=training)
            )
        monkeypatch.setattr(session, "measurements", lambda: found)

    return write


@pytest.fixture
def call(device, tmp_path):
    """A function that makes one call of the command."""

    def make(**others: object) -> None:
        Session(arguments(tmp_path, **others), Stop()).run()

    return make


def test_failed_measurement_is_recorded_and_does_not_stop_others(write_scripts, call, device, tmp_path, capsys):
    write_scripts(bad="print('so far'); raise SystemExit('no memory')", empty="", good=GOOD)
    call()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["bad", "empty", "good"]
    assert re.search(r"failed after \d+ s: exit status 1", lines[0])
    assert "it ended without a result" in lines[1]
    assert "done" in lines[2]
    command = json.loads((device.folder / "good.json").read_text())["command"]
    assert command.startswith("python benchmarks/good/run.py"), "the reported path is that in the repository"
    assert "--results" not in command
    assert device.failure("bad")["log"] == ["so far", "no memory"]
    Session(arguments(tmp_path), Stop()).show()
    assert re.search("failed  bad +the bad: exit status 1", capsys.readouterr().out)


def test_failed_measurement_is_repeated_after_change_of_code_or_with_again(write_scripts, call, device, capsys):
    write_scripts(bad="raise SystemExit(3)", good=GOOD)
    call()
    capsys.readouterr()
    call()
    assert capsys.readouterr().out == ""
    call(again=True)
    assert capsys.readouterr().out.startswith("bad: failed")
    write_scripts(bad=GOOD, good="raise SystemExit('it was done')")
    call()
    assert capsys.readouterr().out.startswith("bad: done")
    assert device.failure("bad") is None


def test_runs_of_failed_training_are_deleted_before_it_is_repeated(write_scripts, call, device):
    write_scripts(training="raise SystemExit(1)")
    call()
    assert (device.run_folder("training") / WITHOUT_GRAPHS).exists()
    write_scripts(training=f"assert not (training / '{WITHOUT_GRAPHS}').exists()\n{GOOD}")
    call()
    assert device.result("training") == {}


def test_time_limits_of_measurement_and_call(write_scripts, call, capsys):
    write_scripts(slow="import time; time.sleep(60)", good=GOOD)
    call()
    output = capsys.readouterr().out
    assert "it took longer than 0.01 minutes" in output
    assert "good: done" in output
    write_scripts(late=GOOD)
    call(minutes=session.SECONDS_FOR_FIGURES / 60)
    assert "late: postponed" in capsys.readouterr().out


@pytest.mark.slow
def test_stopped_training_is_resumed_and_stuck_training_fails(write_scripts, call, tmp_path, capsys, monkeypatch):
    saves = "(training / 'runs').mkdir(parents=True)\n(training / 'runs' / 'a').touch()\n"
    write_scripts(training=f"{saves}sys.exit({UNFINISHED})", good=GOOD)
    monkeypatch.setattr(session, "MAX_SECONDS_WITHOUT_SAVING", 0.0)
    call()
    output = capsys.readouterr().out
    assert "training: not finished" in output
    assert "good" not in output, "the time is up"
    (started, _) = session.measurements()
    assert Session(arguments(tmp_path), Stop()).status(started) == "started"
    write_scripts(training="import time; time.sleep(60)", good=GOOD)
    call()
    output = capsys.readouterr().out
    assert "failed (it saved nothing in" in output
    assert "once more, without CUDA graphs" in output
    assert "training: failed after" in output
    assert "good: done" in output


def test_failed_training_is_repeated_without_cuda_graphs(write_scripts, call, capsys):
    write_scripts(training=f"if not (training / '{WITHOUT_GRAPHS}').exists(): sys.exit(1)\n" + GOOD)
    call()
    output = capsys.readouterr().out
    assert "training: failed (exit status 1); once more, without CUDA graphs" in output
    assert "training: done" in output


def test_signal_stops_the_call(write_scripts, tmp_path, capsys):
    write_scripts(slow="import time; time.sleep(60)", good=GOOD)
    stop = Stop()
    stop.signal = signal.SIGTERM
    Session(arguments(tmp_path), stop).run()
    assert capsys.readouterr().out.startswith("slow: stopped")


def test_list_prints_the_status_of_every_measurement(tmp_path, capsys):
    assert run.main(["--device", "cpu", "--machine", "one", "--results", str(tmp_path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == [each.name for each in measurements.measurements()]
    assert all(line.startswith("to do") for line in lines)
