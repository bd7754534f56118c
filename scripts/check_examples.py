"""Check the types of the Python code in README.md, as a user's editor does: with mypy --strict, and with pyright.

usage: python scripts/check_examples.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from readme_blocks import README, programs


def code(page: Path) -> str:
    """Return the Python blocks of a page as one module; they run one after the other in the tests, too."""
    # a block may continue the body of an earlier loop
    return "\n".join(["# pyright: reportPossiblyUnboundVariable=false", *programs(page.read_text(encoding="utf-8"))])


def main() -> int:
    """Run both checkers; return 1 if either finds an error."""
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "readme.py"
        module.write_text(code(README), encoding="utf-8")
        checkers = (
            # SAM takes over the name of its base, as in most loops
            [sys.executable, "-m", "mypy", "--strict", "--allow-redefinition", str(module)],
            [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(module)],
        )
        return max(subprocess.run(checker, cwd=folder, check=False).returncode for checker in checkers)


if __name__ == "__main__":
    raise SystemExit(main())
