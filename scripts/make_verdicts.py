"""Write the measured parts of docs/verdicts.md from results/.

    python scripts/make_verdicts.py            after benchmarks/verdicts/run.py has written a result
    python scripts/make_verdicts.py --check    writes nothing, and exits 1 if the page is out of date

A part of the page is between two comments, such as `<!-- begin seeds -->` and `<!-- end seeds -->`; the rest is written
by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import results  # noqa: E402
from measured_parts import replace_parts, write_pages  # noqa: E402
from verdicts.table import render_calibration, render_flatness, render_seeds  # noqa: E402

PAGE = ROOT / "docs" / "verdicts.md"
PARTS = {"seeds": render_seeds, "calibration": render_calibration, "flatness": render_flatness}


def page(text: str, folder: Path = results.RESULTS) -> str:
    """Return the page with all parts rendered again."""
    found = results.load("verdicts", folder)

    def measured(render: Callable[[results.Result], str]) -> str:
        return "\n\n".join(render(result).strip() for result in found)

    return replace_parts(PAGE, text, {name: partial(measured, render) for name, render in PARTS.items()})


def main(words: Sequence[str] | None = None) -> int:
    """Write the page, or with `--check` return 1 if it is out of date."""
    return write_pages(words, __file__, __doc__, {PAGE: page})


if __name__ == "__main__":
    sys.exit(main())
