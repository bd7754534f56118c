"""Write the measured parts of the pages in docs/evidence, and their figures, from results/.

    python scripts/make_evidence.py            after benchmarks/evidence/run.py has written a result
    python scripts/make_evidence.py --check    writes nothing, and exits 1 if a page is out of date

The measured part of a page is between `<!-- begin RECIPE -->` and `<!-- end RECIPE -->`; the rest is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import results  # noqa: E402
from evidence.figure import draw, draw_headline  # noqa: E402
from evidence.recipes import EVIDENCE  # noqa: E402
from evidence.table import render  # noqa: E402
from measured_parts import replace_parts  # noqa: E402

PAGES = ROOT / "docs" / "evidence"
IMAGES = ROOT / "docs" / "images"
HEADLINE = ("noisy-labels", "40 % wrong")
"""The recipe and its setting that the README shows."""


def found(recipe: str, folder: Path = results.RESULTS) -> list[results.Result]:
    """Return the results of a recipe, one for each device."""
    return results.load(f"evidence_{recipe.replace('-', '_')}", folder)


def part(recipe: str, folder: Path = results.RESULTS) -> str:
    """Return the measured part of a recipe's page."""
    measured = found(recipe, folder)
    if not measured:
        return f"Not yet measured: `python benchmarks/evidence/run.py {recipe}`."
    image = f"![Differences to the base, with 95 % intervals, beside every control](../images/{_image(recipe)})"
    return "\n\n".join([*(render(result).strip() for result in measured), image])


def page(recipe: str, text: str, folder: Path = results.RESULTS) -> str:
    """Return the text of a recipe's page with its measured part rendered again."""
    return replace_parts(PAGES / f"{recipe}.md", text, {recipe: partial(part, recipe, folder)})


def _image(recipe: str) -> str:
    return f"evidence_{recipe.replace('-', '_')}.png"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    args = parser.parse_args(words)
    outdated = []
    for recipe in EVIDENCE:
        file = PAGES / f"{recipe}.md"
        before = file.read_text(encoding="utf-8")
        after = page(recipe, before)
        if before != after:
            outdated.append(file.name)
        if args.check:
            continue
        file.write_text(after, encoding="utf-8")
        if measured := found(recipe):
            draw(measured[-1], IMAGES / _image(recipe))
            print(IMAGES / _image(recipe))
            if recipe == HEADLINE[0]:
                draw_headline(measured[-1], IMAGES / "headline.png", HEADLINE[1])
                print(IMAGES / "headline.png")
    if args.check and outdated:
        print(
            f"docs/evidence is out of date ({', '.join(outdated)}): run python scripts/make_evidence.py",
            file=sys.stderr,
        )
    return int(args.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
