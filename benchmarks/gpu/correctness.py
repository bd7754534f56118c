"""Run device_checks.py, the tests that need a GPU, and the tests of the contract and of the engine on this device.

python benchmarks/gpu/run.py --only correctness
"""

import argparse
import collections
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT / "src")]

import results  # noqa: E402
from gpu.device_results import add_arguments  # noqa: E402

DEVICE_CHECKS = HERE / "device_checks.py"
FILES = ("test_cuda.py", "contract/test_*.py", "engine/test_*.py")
_LOG_LINES = 12
_TINY = "not momentum and not adamw and not classic and not closure"
"""An expression of pytest -k that selects one test of each kind."""


class Tally:
    """A plugin of pytest that counts passed, failed and skipped tests by file."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = {}
        self.failures: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the report of a test, or of its fixtures if they failed or skipped it."""
        file = report.nodeid.partition("::")[0]
        if report.when == "call" or report.outcome != "passed":
            self.counts.setdefault(file, collections.Counter())[report.outcome] += 1
        if report.failed:
            self._add_failure(report.nodeid, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that cannot be imported as a failure; a file skipped as a whole has no tests."""
        if report.failed:
            self.counts.setdefault(report.nodeid, collections.Counter())["failed"] += 1
            self._add_failure(report.nodeid, report.longreprtext)

    def _add_failure(self, name: str, text: str) -> None:
        self.failures.append({"test": name, "last_lines": text.splitlines()[-_LOG_LINES:]})


def main() -> int:
    """Run the tests and save their counts and failures; failed tests do not fail the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    os.environ["STEPPE_DEVICE"] = args.device
    found = [path for name in FILES for path in sorted((ROOT / "tests").glob(name))]
    files = [DEVICE_CHECKS, ROOT / "tests" / "test_cuda.py"] if args.tiny else [DEVICE_CHECKS, *found]
    tally, began = Tally(), time.perf_counter()
    words = ["-p", "no:cacheprovider", "-q", "--continue-on-collection-errors", f"--rootdir={ROOT}", *map(str, files)]
    words += ["-k", _TINY] if args.tiny else []
    status = pytest.main(words, plugins=[tally])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        return int(status)
    total = sum(tally.counts.values(), collections.Counter())
    counts = {name: total[name] for name in ("passed", "failed", "skipped")}
    seconds = round(time.perf_counter() - began, 1)
    by_file = {file: dict(count) for file, count in tally.counts.items()}
    results.save("correctness", {**counts, "seconds": seconds, "files": by_file, "failures": tally.failures}, args)
    print("= " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
