"""benchmarks/gpu/correctness.py: counts of tests, and the last lines of their failures."""

import json
import sys

from gpu import correctness, table
from results import Result


def test_correctness_counts_tests_and_keeps_last_lines_of_failures(tmp_path, monkeypatch):
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.skip\ndef test_not_here(): pass\n"
        "def test_bad(): assert 1 + 1 == 3, 'sums'\n"
        "@pytest.fixture\ndef broken(): raise OSError('no device')\n"
        "def test_worse(broken): pass\n"
    )
    monkeypatch.setattr(correctness, "DEVICE_CHECKS", file)
    monkeypatch.setattr(correctness, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cuda.py").write_text("import nothing_of_that_name\n")  # cannot be imported
    monkeypatch.delitem(sys.modules, "test_cuda", raising=False)  # the real one, if this process has imported it
    monkeypatch.setenv("STEPPE_DEVICE", "")
    options = ["--results", str(tmp_path / "results"), "--machine", "one", "--device", "cpu", "--tiny"]
    monkeypatch.setattr(sys, "argv", ["correctness.py", *options])
    assert correctness.main() == 0
    data = json.loads((tmp_path / "results" / "one" / "correctness.json").read_text())["data"]
    assert {name: data[name] for name in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 3, "skipped": 1}
    monkeypatch.delitem(sys.modules, "test_cuda", raising=False)
    (tmp_path / "tests" / "test_cuda.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["correctness.py", *options])
    assert correctness.main() == 0
    data = json.loads((tmp_path / "results" / "one" / "correctness.json").read_text())["data"]
    assert data["files"] == {"test_three.py": {"passed": 1, "skipped": 1, "failed": 2}}
    assert [failure["test"] for failure in data["failures"]] == ["test_three.py::test_bad", "test_three.py::test_worse"]
    text = table.correctness([Result("correctness", "a device", False, "2026-11-23", "run.py", "2.13.0", {}, data)])
    assert "| **all** | 1 | 2 | 1 |" in text
    assert "Failed: `test_three.py::test_worse`: `OSError: no device`" in text
