"""Tables of text, in Markdown and for the terminal: numbers to the right, and the columns in `left` to the left."""

from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    rule = "".join("|---" if i in left else "|---:" for i in range(len(headings))) + "|"
    return [markdown_row(headings), rule, *map(markdown_row, rows)]


def terminal_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Collection[int] = (0,),
    title: str | None = None,
    ends: Collection[int] = (),
) -> Table:
    """Return a table for a console, with a gap after the rows at the positions `ends`."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i in left else "right", no_wrap=i not in left)
    for i, row in enumerate(rows):
        table.add_row(*row, end_section=i in ends)
    return table


def size_of(table: Table, console: Console) -> Measurement:
    """Return the columns that a table takes where the console does not limit them."""
    return table.__rich_measure__(console, console.options.update(max_width=1000))


def show_table(console: Console, table: Table, notes: Iterable[str]) -> None:
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)


def bullets(sentences: Iterable[str]) -> list[str]:
    return [f"- {sentence}" for sentence in sentences]
