"""Tables of text with notes, in Markdown and for the terminal."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html

from rich import table as rich
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape

_PART = re.compile(r"[^\s_]*[\s_]*")  # a word, or a part of one that ends in underscores, with the space after it


@dataclass(frozen=True)
class Table:
    """Rows of text: numbers to the right, and the columns in `left` to the left."""

    headings: Sequence[str]
    sections: Mapping[str, Sequence[Sequence[str]]]
    """The rows by the title of their section, which is "" for rows without one."""
    left: Collection[int] = (0,)
    title: str = ""
    optional: Sequence[Collection[int]] = ()
    """Columns that a narrow console leaves out, as many as it takes, the first ones first."""
    wraps: bool = True
    """True if the left columns may wrap before any column is left out."""

    def markdown(self) -> list[str]:
        """Return the lines of the table, without its title."""
        rule = "".join("|---" if i in self.left else "|---:" for i in range(len(self.headings))) + "|"
        lines = [_markdown_row(self.headings), rule]
        for title, rows in self.sections.items():
            lines += [f"| **{title}** |" + " |" * (len(self.headings) - 1)] if title and rows else []
            lines += map(_markdown_row, rows)
        return lines

    def html(self) -> str:
        """Return the table for a notebook, without its title."""
        lines = [_html_row("th", self.headings)]
        for title, rows in self.sections.items():
            spanned = f'<tr><th colspan="{len(self.headings)}" style="text-align: left">{escape_html(title)}</th></tr>'
            lines += [spanned] if title and rows else []
            lines += [_html_row("td", row) for row in rows]
        return f"<table>{''.join(lines)}</table>"

    def show(self, console: Console, notes: Iterable[str]) -> None:
        """Print the table and the notes."""
        console.print(self._fitted(console))
        for note in notes:
            console.print(note, highlight=False, markup=False)

    def _fitted(self, console: Console) -> rich.Table:
        """Return the table for the width of a console.

        The headings are wrapped first, then the left columns if they may be, and then columns are left out.
        """

        narrow = list(map(self._narrow_heading, range(len(self.headings))))
        forms = [(self.headings, False), (narrow, False), *([(narrow, True)] if self.wraps else [])]
        hidden: list[int] = []
        for columns in ((), *self.optional):
            hidden += columns
            for headings, wrapped in forms:
                table = self._terminal(hidden, headings)
                size = table.__rich_measure__(console, console.options.update(max_width=1000))
                if (size.minimum if wrapped else size.maximum) <= console.width:
                    return table
        return table

    def _narrow_heading(self, column: int) -> str:
        """Return a heading in lines as wide as the cells below it, or as the longest part of its words."""
        heading = self.headings[column]
        if column in self.left:
            return heading
        cells = [row[column] for rows in self.sections.values() for row in rows]
        parts = [_PART.findall(line) for line in heading.split("\n")]
        width = max(map(cell_len, [*cells, *(part.strip() for line in parts for part in line)]), default=0)
        lines: list[str] = []
        for line in parts:
            lines.append("")
            for part in line:
                if cell_len((lines[-1] + part).rstrip()) > width:
                    lines.append("")
                lines[-1] += part
        return "\n".join(line.rstrip() for line in lines)

    def _terminal(self, hidden: Collection[int], headings: Sequence[str]) -> rich.Table:
        """Return the table for a console, with a gap after each section."""
        table = rich.Table(
            title=self.title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
        )
        shown = [i for i in range(len(self.headings)) if i not in hidden]
        for i in shown:
            left = i in self.left
            table.add_column(escape(headings[i]), justify="left" if left else "right", no_wrap=not left)
        for rows in self.sections.values():
            for row in rows:
                table.add_row(*(escape(row[i]) for i in shown))
            table.add_section()
        return table


class TableWithNotes(ABC):
    """A table and sentences below it, for Markdown and for the terminal."""

    @abstractmethod
    def table(self) -> Table: ...

    @abstractmethod
    def notes(self) -> Iterator[str]: ...

    def section(self, level: int) -> str:
        """Return both in Markdown, below the table's title as a heading of a level."""
        table = self.table()
        return "\n".join([f"{'#' * level} {table.title}", "", *table.markdown(), "", *bullets(self.notes()), ""])

    def show(self, console: Console) -> None:
        """Print both; columns that do not fit a narrow console are in summary.md only."""
        self.table().show(console, self.notes())


def bullets(sentences: Iterable[str]) -> list[str]:
    """Return the lines of a list in Markdown."""
    return [f"- {sentence}" for sentence in sentences]


def _html_row(kind: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{escape_html(cell)}</{kind}>' for cell in cells)}</tr>"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
