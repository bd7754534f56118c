"""`steppe methods`: a table of the methods, or the card of one."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from steppe.experiments.errors import ExperimentError
from steppe.methods._card import MethodCard
from steppe.methods.cards import card, memory
from steppe.methods.registry import CARDS


def methods(patterns: Sequence[str], console: Console, *, bibtex: bool = False) -> None:
    """Show the card of a single named method, else a table of those that match; ExperimentError if none does."""
    found = _matching(patterns)
    if bibtex:
        entries = dict.fromkeys(paper.bibtex() for method in found for paper in method.papers)
        console.print("\n\n".join(entries), highlight=False, markup=False, soft_wrap=True)
    elif len(found) == 1 and len(patterns) == 1 and patterns[0].lower() in _names(found[0]):
        console.print(Markdown(card(found[0].name)))
    else:
        console.print(_table(found))
        console.print(
            "Cost: passes, forward and backward over the batch, a step; a step of the base has 1. Memory: beside the "
            "base, at the worst moment of a step, in units of the weights' size. `steppe methods gsam` shows a card.",
            highlight=False,
            markup=False,
        )


def _matching(patterns: Sequence[str]) -> list[MethodCard]:
    """Return the methods that match one of the patterns, in the order of the registry; all, if there is no pattern."""
    for pattern in patterns:
        if not any(_matches(method, pattern) for method in CARDS.values()):
            raise ExperimentError(_unknown(pattern))
    return [m for m in CARDS.values() if not patterns or any(_matches(m, pattern) for pattern in patterns)]


def _names(method: MethodCard) -> tuple[str, str]:
    return method.name.lower(), method.label.lower()


def _matches(method: MethodCard, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern.lower()) for name in _names(method))


def _unknown(pattern: str) -> str:
    known = [name for method in CARDS.values() for name in _names(method)]
    close = difflib.get_close_matches(pattern.lower().strip("*?"), known, n=1, cutoff=0.4)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"no method matches {pattern!r}{meant} `steppe methods` lists them all"


def _table(found: Sequence[MethodCard]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), leading=0)
    for heading, justify, width in (("name", "left", 18), ("cost", "left", 12), ("memory", "right", None)):
        table.add_column(heading, justify=justify, min_width=width)  # type: ignore[arg-type]
    table.add_column("paper", max_width=20)
    table.add_column("when to use it", ratio=1)
    for method in found:
        name = f"{method.name}\n[dim]{method.label}[/dim]"
        table.add_row(name, method.cost, memory(method.name), _paper(method), method.when.replace("`", ""))
    return table


def _paper(method: MethodCard) -> str:
    who, _, number = method.paper.short.rpartition(", ")
    return f"[link={method.paper.url}]{who}\n{number}[/link]"
