"""Is it right on this device? The tests that need a GPU, the contract, mixed precision, and device_checks.py.

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
from gpu.place import add_arguments  # noqa: E402

OWN = HERE / "device_checks.py"
FILES = ("test_cuda.py", "test_mixed_precision.py", "test_contract_*.py")
_LINES = 12
_TINY = "not momentum and not adamw and not classic and not closure"
"""One of each kind."""


class Tally:
    """Counts what becomes of the tests, file by file."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = {}
        self.failures: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a report: a test's own, or that of its surroundings where these failed or skipped it."""
        file = report.nodeid.partition("::")[0]
        if report.when == "call" or report.outcome != "passed":
            self.counts.setdefault(file, collections.Counter())[report.outcome] += 1
        if report.failed:
            self._failed(report.nodeid, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read is a failure; one that is skipped as a whole is no test."""
        if report.failed:
            self.counts.setdefault(report.nodeid, collections.Counter())["failed"] += 1
            self._failed(report.nodeid, report.longreprtext)

    def _failed(self, name: str, text: str) -> None:
        self.failures.append({"test": name, "last_lines": text.splitlines()[-_LINES:]})


def main() -> int:
    """Run the tests and write down what became of them; failures of tests are a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    os.environ["STEPPE_DEVICE"] = args.device
    found = [path for name in FILES for path in sorted((ROOT / "tests").glob(name))]
    files = [OWN, ROOT / "tests" / "test_cuda.py"] if args.tiny else [OWN, *found]
    tally, begun = Tally(), time.perf_counter()
    words = ["-p", "no:cacheprovider", "-q", "--continue-on-collection-errors", f"--rootdir={ROOT}", *map(str, files)]
    words += ["-k", _TINY] if args.tiny else []
    status = pytest.main(words, plugins=[tally])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        return int(status)
    total = sum(tally.counts.values(), collections.Counter())
    counts = {name: total[name] for name in ("passed", "failed", "skipped")}
    seconds = round(time.perf_counter() - begun, 1)
    by_file = {file: dict(count) for file, count in tally.counts.items()}
    sys.argv = [str(HERE / "run.py"), "--only", "correctness"]  # what somebody would type
    results.save("correctness", {**counts, "seconds": seconds, "files": by_file, "failures": tally.failures}, args)
    print("= " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
