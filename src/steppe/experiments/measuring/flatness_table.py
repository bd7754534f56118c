"""The measured flatness of a user's model, as a table on the terminal and in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from rich.console import Console

from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.analysis.tables import markdown_row, markdown_table, terminal_table
from steppe.experiments.analysis.verdicts import CAVEATS, Verdict, compared
from steppe.flatness import FAMILIES, Flatness, Measure

TITLE = "# Flatness of "

_HEADINGS, _LEFT = ("measure", "value", "note"), (0, 2)


@dataclass(frozen=True)
class FlatnessTable:
    """The measures of several files of weights of one network, on the same samples."""

    model: str
    setting: str
    names: tuple[str, str]
    found: Mapping[str, Flatness]
    """The measures by name; with a reference, its files are the second half."""
    paired: bool

    def groups(self) -> dict[str, list[Flatness]]:
        """Return the measures by method, the reference first."""
        every = list(self.found.values())
        if not self.paired:
            return {self.names[0]: every} if len(every) > 1 else {name: [one] for name, one in self.found.items()}
        ours, theirs = every[: len(every) // 2], every[len(every) // 2 :]
        return {self.names[1]: theirs, self.names[0]: ours}

    def verdict(self) -> Verdict | None:
        """Compare the methods; None without a reference."""
        if not self.paired:
            return None
        theirs, ours = self.groups().values()
        return compared(*self.names, self.names, list(zip(ours, theirs, strict=True)))

    def caption(self) -> str:
        """Return the size of the network, the samples and the setting, in words."""
        one = next(iter(self.found.values())).settings
        return (
            f"{one['parameters']} weights, {one['samples']} samples, {self.setting}; BatchNorm in mode "
            f"{one['batch_norm']}; lower is flatter."
        )

    def markdown(self) -> str:
        """Return every number of every file, and the verdict."""
        parts = [f"{TITLE}{self.model}", self.caption()]
        verdict = self.verdict()
        if verdict is not None:
            parts += [f"## {' against '.join(self.names)}", verdict.markdown()]
            parts += ["\n".join(f"- {caveat}" for caveat in CAVEATS)]
        for name, one in self.found.items():
            lines = markdown_table(_HEADINGS, [], _LEFT)
            for family, rows in _rows([one]):
                lines += [f"| **{family}** | | |", *map(markdown_row, rows)]
            parts += [f"## {name}", "\n".join(lines)]
        return "\n\n".join(parts) + "\n"

    def show(self, console: Console) -> None:
        """Print the mean of the numbers or, with a reference, the comparison."""
        console.print(f"{self.model}: {self.caption()}", highlight=False, markup=False)
        verdict = self.verdict()
        if verdict is not None:
            verdict.show(console)
            for caveat in CAVEATS:
                console.print(caveat, highlight=False, markup=False)
            return
        rows = [rows for _, rows in _rows(list(self.found.values()))]
        ends = [end - 1 for end in accumulate(map(len, rows))]
        console.print(terminal_table(_HEADINGS, chain.from_iterable(rows), _LEFT, ends=ends))


def _rows(measured: Sequence[Flatness]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the rows of each measured family; of several files, the mean with the standard deviation."""
    for family in FAMILIES.values():
        rows = []
        for name, label in family.measures.items():
            each = [one.measures[name] for one in measured if name in one.measures]
            if each:
                rows.append([label, *(_one(each[0]) if len(measured) == 1 else _several(each))])
        if rows:
            yield family.title, rows


def _one(found: Measure) -> tuple[str, str]:
    return f"{found.value:.4g}" + ("" if found.error is None else f" ± {found.error:.2g}"), found.note


def _several(found: Sequence[Measure]) -> tuple[str, str]:
    over = estimate([measure.value for measure in found])
    spread = "" if over.sd is None else f" ± {over.sd:.2g}"
    notes = {measure.note for measure in found if measure.note == "not converged"}
    return f"{over.mean:.4g}{spread}", "; ".join([f"sd over {over.n} files", *notes])
