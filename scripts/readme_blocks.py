"""Read the code blocks of README.md, which the tests, `make check` and `make release` run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


@dataclass(frozen=True)
class Block:
    """A code block."""

    language: str
    """"python", "diff", or "" for commands of a shell."""
    text: str

    @property
    def installation(self) -> str | None:
        """What the first line tells to install, such as "'.[lightning]'"; None if Steppe alone is enough."""
        found = re.match(r"# pip install (.+)\n", self.text)
        return found[1] if found else None

    def side(self, sign: str) -> str:
        """Return the program before ("-") or after ("+") a diff."""
        lines = self.text.splitlines()
        return "".join(f"{line[1:]}\n" for line in lines if not line or line[0] in (" ", sign))


def blocks(text: str) -> list[Block]:
    """Return the code blocks of a page, in their order."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)]


def programs(text: str) -> list[str]:
    """Return the Python programs that need Steppe and torch alone; each continues the one before it."""
    return [
        block.side("+") if block.language == "diff" else block.text
        for block in blocks(text)
        if block.language in ("diff", "python") and block.installation is None
    ]
