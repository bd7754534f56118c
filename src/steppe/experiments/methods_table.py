"""`steppe methods`: a table of the methods, or the card of one."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from steppe.experiments.errors import ExperimentError, closest
from steppe.methods._card import MethodCard
from steppe.methods.cards import card, memory
from steppe.methods.registry import CARDS


def methods(patterns: Sequence[str], console: Console, *, bibtex: bool = False) -> dict[str, Any]:
    """Show the card of a single named method, else a table of those that match; ExperimentError if none does.

    Returns those that match, as JSON has them.
    """
    by_name = {name.lower(): method for method in CARDS.values() for name in (method.name, method.label)}
    found = _matching(patterns or ["*"], by_name)
    if bibtex:
        entries = dict.fromkeys(paper.bibtex() for method in found for paper in method.papers)
        console.print("\n\n".join(entries), highlight=False, markup=False, soft_wrap=True)
    elif len(patterns) == 1 and (named := by_name.get(patterns[0].lower())):
        # a narrow console breaks cells at a space, and would cut off the standard deviations without one
        console.print(Markdown(card(named.name).replace("±", " ±")))
    else:
        console.print(_table(found))
        console.print(
            "Cost: passes, forward and backward over the batch, a step; a step of the base has 1. Memory: beside the "
            "base, at the worst moment of a step, in units of the weights' size. `steppe methods gsam` shows a card.",
            highlight=False,
            markup=False,
        )
    return {"methods": [_json(method) for method in found]}


def _json(method: MethodCard) -> dict[str, Any]:
    texts = {name: getattr(method, name) for name in ("name", "label", "summary", "cost", "memory", "when", "when_not")}
    papers = [{"short": paper.short, "url": paper.url, "bibtex": paper.bibtex()} for paper in method.papers]
    return {**texts, "usual": dict(method.usual), "caveats": list(method.caveats), "papers": papers}


def _matching(patterns: Sequence[str], by_name: Mapping[str, MethodCard]) -> list[MethodCard]:
    """Return the methods that match one of the patterns, in the order of the registry."""
    names = set[str]()
    for pattern in patterns:
        matches = fnmatch.filter(by_name, pattern.lower())
        if not matches:
            meant = closest(pattern.lower().strip("*?"), by_name, cutoff=0.4)
            raise ExperimentError(f"no method matches {pattern!r}{meant} `steppe methods` lists them all")
        names |= {by_name[name].name for name in matches}
    return [method for name, method in CARDS.items() if name in names]


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
