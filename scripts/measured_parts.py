"""Replace the measured parts of a page: each is between two comments, `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
