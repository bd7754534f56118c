"""Write generated parts of pages, or check them: each is between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def replace_parts(page: Path, text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """Return the text of a page with all parts rendered again.

    Raises:
        ValueError: a part is missing, occurs twice, or is unknown.
    """
    for name, render in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(
                f"{page} must contain {begin} and then {end}, once each; the measured part is between them"
            )
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{render()}\n\n{end}{rest.partition(end)[2]}"
    unknown = set(re.findall(r"<!-- begin (\S+) -->", text)) - set(parts)
    if unknown:
        raise ValueError(f"{page} has unknown parts {', '.join(sorted(unknown))}; known are {', '.join(parts)}")
    return text


def write_pages(
    words: Sequence[str] | None,
    script: str,
    doc: str | None,
    pages: Mapping[Path, Callable[[str], str]],
    draw: Callable[[], Iterable[Path]] = tuple,
) -> int:
    """Be the command line of a script: write the pages and draw their figures, or check that nothing is out of date.

    Args:
        words: The words of the command line, by default those of the process.
        script: The script's file.
        doc: The help.
        pages: For each file, a function that returns its new text from the one that it has.
        draw: Function that draws the figures and returns their files.

    Returns:
        The exit status: 1 if `--check` was given and a page is out of date.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    args = parser.parse_args(words)
    before = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in pages}
    after = {path: page(before[path]) for path, page in pages.items()}
    outdated = [path.name for path in pages if before[path] != after[path]]
    if args.check:
        if outdated:
            print(f"out of date: {', '.join(outdated)}; run python scripts/{Path(script).name}", file=sys.stderr)
        return int(bool(outdated))
    for file in draw():
        print(file)
    for path, text in after.items():
        path.write_text(text, encoding="utf-8")
    return 0
