"""Check the types of the Python code in README.md, as a user's editor does: with mypy --strict, and with pyright.

usage: python scripts/check_examples.py
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "README.md"


def code(page: Path) -> str:
    """Return the Python blocks of a page as one module; they run one after the other in the tests, too."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    # a block may continue the body of an earlier loop
    return "\n".join(["# pyright: reportPossiblyUnboundVariable=false", *blocks])


def main() -> int:
    """Run both checkers; return 1 if either finds an error."""
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "readme.py"
        module.write_text(code(PAGE), encoding="utf-8")
        checkers = (
            # the closure of the README has no annotations, as most closures
            [sys.executable, "-m", "mypy", "--strict", "--allow-untyped-defs", "--allow-untyped-calls", str(module)],
            [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(module)],
        )
        return max(subprocess.run(checker, cwd=folder, check=False).returncode for checker in checkers)


if __name__ == "__main__":
    raise SystemExit(main())
