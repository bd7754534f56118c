"""The measured flatness of a user's model, as a table on the terminal and in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.analysis.tables import Table, bullets
from steppe.experiments.analysis.verdicts import CAVEATS, Pairing, Verdict, compare
from steppe.flatness import FAMILIES, Flatness, Measure
from steppe.flatness.families import labels_by_family

TITLE = "# Flatness of "


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
        return next(iter(compare([Pairing(*self.names, self.names, list(zip(ours, theirs, strict=True)))])), None)

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
        if (verdict := self.verdict()) is not None:
            parts += [f"## {' against '.join(self.names)}", verdict.markdown(), "\n".join(bullets(CAVEATS))]
        for name, one in self.found.items():
            parts += [f"## {name}", "\n".join(_table([one]).markdown())]
        return "\n\n".join(parts) + "\n"

    def show(self, console: Console) -> None:
        """Print the mean of the numbers or, with a reference, the comparison."""
        console.print(f"{self.model}: {self.caption()}", highlight=False, markup=False)
        if (verdict := self.verdict()) is None:
            _table(list(self.found.values())).show(console, [])
        else:
            verdict.show(console, CAVEATS)


def table_of_methods(groups: Mapping[str, Sequence[Flatness]], title: str) -> Table:
    """Return the measures by family, with a column for each method: the mean over its runs, and the deviation."""

    def cells(name: str) -> list[str]:
        each = [[one.measures[name].value for one in found if name in one.measures] for found in groups.values()]
        return [estimate(values).text(".3g", ".2g", " ± ") if values else "" for values in each]

    every = [one for found in groups.values() for one in found]
    return Table(("measure", *groups), _by_family(every, cells), title=title)


def _table(measured: Sequence[Flatness]) -> Table:
    """Return the measures by family; of several files, the mean with the standard deviation."""

    def cells(name: str) -> tuple[str, str]:
        return _cells([one.measures[name] for one in measured if name in one.measures], len(measured))

    return Table(("measure", "value", "note"), _by_family(measured, cells), left=(0, 2))


def _by_family(measured: Sequence[Flatness], cells: Callable[[str], Sequence[str]]) -> dict[str, list[list[str]]]:
    """Return a row for each measure that was measured: its label, and its cells by its name."""
    labels = labels_by_family(name for one in measured for name in one.measures)
    return {
        FAMILIES[family].title: [[label, *cells(name)] for name, label in of_family.items()]
        for family, of_family in labels.items()
    }


def _cells(found: Sequence[Measure], files: int) -> tuple[str, str]:
    """Return the value and the note of a measure of so many files."""
    if files == 1:
        value, error = found[0].value, found[0].error
        return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}"), found[0].note
    over = estimate([measure.value for measure in found])
    notes = {measure.note for measure in found if measure.note == "not converged"}
    return over.text(".4g", ".2g", " ± "), "; ".join([f"sd over {over.n} files", *notes])
