"""The measured flatness of a user's model, as a table on the terminal and in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.analysis.verdicts import CAVEATS, Verdict, compared
from steppe.flatness import FAMILIES, Flatness, Measure

TITLE = "# Flatness of "

_HEADINGS = ("measure", "value", "note")


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
        """Return every number, and the verdict, as Markdown."""
        parts = [f"{TITLE}{self.model}", self.caption()]
        verdict = self.verdict()
        if verdict is not None:
            parts += [f"## {' against '.join(self.names)}", verdict.markdown()]
            parts += ["\n".join(f"- {caveat}" for caveat in CAVEATS)]
        for name, one in self.found.items():
            lines = ["| " + " | ".join(_HEADINGS) + " |", "|---|---:|---|"]
            for family, rows in _rows([one]):
                lines.append(f"| **{family}** | | |")
                lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            parts += [f"## {name}", "\n".join(lines)]
        return "\n\n".join(parts) + "\n"

    def show(self, console: Console) -> None:
        """Print the numbers or, with a reference, the comparison."""
        console.print(f"{self.model}: {self.caption()}", highlight=False, markup=False)
        verdict = self.verdict()
        if verdict is not None:
            verdict.show(console)
            for caveat in CAVEATS:
                console.print(caveat, highlight=False, markup=False)
            return
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for heading in _HEADINGS:
            table.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=heading == "value")
        for _, rows in _rows(list(self.found.values())):
            for row in rows:
                table.add_row(*row, end_section=row is rows[-1])
        console.print(table)


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
