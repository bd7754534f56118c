"""Write the measured parts of the pages in docs/evidence, and their figures, from results/.

    python scripts/make_evidence.py            after benchmarks/evidence/run.py has written a result
    python scripts/make_evidence.py --check    writes nothing, and exits 1 if a page is out of date

The measured part of a page is between `<!-- begin RECIPE -->` and `<!-- end RECIPE -->`; the rest is written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import results  # noqa: E402
from evidence.figure import draw, draw_headline  # noqa: E402
from evidence.measured import Measured, file_name  # noqa: E402
from evidence.recipes import EVIDENCE  # noqa: E402
from evidence.table import render, render_search  # noqa: E402
from measured_parts import replace_parts, write_pages  # noqa: E402

PAGES = ROOT / "docs" / "evidence"
IMAGES = ROOT / "docs" / "images"
HEADLINE = ("noisy-labels", "40 % wrong")
"""The recipe and its setting that the README shows."""


def part(recipe: str, folder: Path = results.RESULTS) -> str:
    """Return the measured part of a recipe's page."""
    measured = Measured.load(recipe, folder)
    if not measured:
        return f"Not yet measured: `python benchmarks/evidence/run.py {recipe}`."
    alt = "Differences to the base, with 95 % intervals, beside every control"
    figure = [f"![{alt}](../images/{_image(recipe)})"] if measured.others else []
    return "\n\n".join([*figure, render(measured), render_search(measured)])


def page(recipe: str, text: str, folder: Path = results.RESULTS) -> str:
    """Return the text of a recipe's page with its measured part rendered again."""
    return replace_parts(PAGES / f"{recipe}.md", text, {recipe: partial(part, recipe, folder)})


def draw_all(images: Path = IMAGES) -> Iterator[Path]:
    """Draw the figures of the recipes that have been measured, and that of the README; yield their files."""
    for recipe in EVIDENCE:
        if (measured := Measured.load(recipe)).others:
            draw(measured, path := images / _image(recipe))
            yield path
            if recipe == HEADLINE[0]:
                draw_headline(measured, path := images / "headline.png", HEADLINE[1])
                yield path


def _image(recipe: str) -> str:
    return f"{file_name(recipe)}.png"


def main(words: Sequence[str] | None = None) -> int:
    """Write the pages, or with `--check` return 1 if one is out of date."""
    pages = {PAGES / f"{recipe}.md": partial(page, recipe) for recipe in EVIDENCE}
    return write_pages(words, __file__, __doc__, pages, draw_all)


if __name__ == "__main__":
    sys.exit(main())
