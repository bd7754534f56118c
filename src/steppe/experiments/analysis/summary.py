"""The summary of a comparison: a row for each method, the paired differences, and their verdicts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.tables import Table, bullets
from steppe.experiments.analysis.verdicts import CAVEATS, Verdict
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.storage.files import write_atomically, write_json
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results, RunFolder

_NAMES = {"sample": "a sample of Fashion-MNIST", "fashion-mnist": "Fashion-MNIST", "digits": "digits"}

_MANY = 6  # verdicts, from which on the notes warn that some will be wrong by chance


@dataclass(frozen=True)
class Row:
    """One method after so many standardized epochs: mean and standard deviation over its runs."""

    method: MethodSpec
    standardized_epoch: int
    passes: Estimate
    train_accuracy: Estimate
    test_accuracy: Estimate
    gap: Estimate
    train_loss: Estimate
    seconds: Estimate

    def cells(self) -> list[str]:
        return [text(self) for text in _COLUMNS.values()]


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "method": lambda row: row.method.label,
    "std.\nepochs": lambda row: str(row.standardized_epoch),
    "passes\na step": lambda row: f"{row.passes.mean:.2f}",
    "train\naccuracy %": lambda row: row.train_accuracy.text(".2f"),
    "test\naccuracy %": lambda row: row.test_accuracy.text(".2f"),
    "gap,\npoints": lambda row: row.gap.text(".2f"),
    "train\nloss": lambda row: row.train_loss.text(".3f"),
    "time,\ns": lambda row: f"{row.seconds.mean:.0f}",
    "runs": lambda row: str(row.gap.n),
}
_LEAST_NEEDED = ((6,), (7,), (1,))  # columns in the order in which a narrow console leaves them out


@dataclass(frozen=True)
class Difference:
    """A method minus the first one, paired by seed, at equal compute: percentage points."""

    method: MethodSpec
    reference: MethodSpec
    standardized_epoch: int
    test_accuracy: Estimate
    gap: Estimate

    def sentence(self) -> str:
        runs = self.gap.n
        return (
            f"{self.method.label} against {self.reference.label} at {self.standardized_epoch} standardized epochs, "
            f"{runs} paired run{'s'[: runs > 1]}: test accuracy {_verdict(self.test_accuracy, better=1)}; "
            f"generalization gap {_verdict(self.gap, better=-1)}."
        )


class SummaryFiles(ABC):
    """A table with notes, for the terminal, summary.md and summary.json."""

    @abstractmethod
    def table(self) -> Table: ...

    @abstractmethod
    def notes(self) -> Iterator[str]: ...

    @abstractmethod
    def json(self) -> dict[str, Any]: ...

    def markdown(self) -> str:
        table = self.table()
        return "\n".join([f"# {table.title}", "", *table.markdown(), "", *bullets(self.notes()), ""])

    def show(self, console: Console) -> None:
        """Print the table and the notes; columns that do not fit a narrow console are in summary.md only."""
        self.table().show(console, self.notes())

    def write(self, folder: RunFolder) -> None:
        write_atomically(folder.path / "summary.md", self.markdown().encode())
        write_json(folder.path / "summary.json", self.json())


@dataclass(frozen=True)
class Summary(SummaryFiles):
    """Every number of a comparison, once."""

    title: str
    rows: Sequence[Row]
    differences: Sequence[Difference]
    unfinished: Sequence[str]
    flatness: Sequence[Verdict] = ()
    """The verdicts on flatness, where it was measured."""

    def table(self) -> Table:
        rows = [row.cells() for row in self.rows]
        return Table(list(_COLUMNS), {"": rows}, title=self.title, optional=_LEAST_NEEDED)

    def notes(self) -> Iterator[str]:
        yield from (difference.sentence() for difference in self.differences)
        verdicts = sum(value.sign is not None for d in self.differences for value in (d.test_accuracy, d.gap))
        if verdicts >= _MANY:
            yield (
                f"Each of these {verdicts} intervals alone has a confidence of 95 %: where there is no difference, one "
                "in twenty still shows one."
            )
        if self.unfinished:
            yield f"Not finished, and not in the table where it has not come so far: {', '.join(self.unfinished)}."

    def markdown(self) -> str:
        if not self.flatness:
            return super().markdown()
        flatness = ["", "## Flatness", "", *(f"{verdict.markdown()}\n" for verdict in self.flatness), *bullets(CAVEATS)]
        return super().markdown() + "\n".join([*flatness, ""])

    def show(self, console: Console) -> None:
        super().show(console)
        for verdict in self.flatness:
            verdict.show(console)

    def json(self) -> dict[str, Any]:
        """Return the summary as JSON, with the verdicts in words."""
        values = asdict(self) | {"flatness": [verdict.json() for verdict in self.flatness]}
        if not self.flatness:
            del values["flatness"]
        for row, value in zip(self.rows, values["rows"], strict=True):
            value["method"] = str(row.method)
        for difference, value in zip(self.differences, values["differences"], strict=True):
            value |= {"method": str(difference.method), "reference": str(difference.reference)}
            value["test_accuracy"]["half_width_95"] = difference.test_accuracy.half_width
            value["gap"]["half_width_95"] = difference.gap.half_width
            value["verdict"] = difference.sentence()
        return values


def setting(recipe: Recipe) -> str:
    """Describe in one line the network, the data and the optimizer."""
    data = _NAMES[recipe.data.dataset]
    if recipe.data.shots is not None:
        data += f", {recipe.data.shots} image{'s'[: recipe.data.shots > 1]} a class"
    if recipe.data.label_noise:
        data += f", {100 * recipe.data.label_noise:g} % wrong training labels"
    base = f"{recipe.training.base.upper() if recipe.training.base == 'sgd' else 'AdamW'}, lr {recipe.training.lr:g}"
    if recipe.training.head_lr is not None:
        base += f" (head {recipe.training.head_lr:g})"
    if recipe.base_momentum:
        base += f", momentum {recipe.base_momentum:g}"
    # a rho that every method replaces by its own would only mislead
    takes_it = any(
        "rho" in s.definition.arguments and "rho" not in dict(s.overrides) for s in recipe.comparison.methods
    )
    rho = f", rho {recipe.training.rho:g}" if takes_it else ""
    return f"{_network(recipe)} on {data}: {base}, batch {recipe.training.batch_size}{rho}"


def _network(recipe: Recipe) -> str:
    """Describe the network and its initial weights."""
    probe = ", linear probe" if recipe.model.freeze else ""
    if recipe.model.backbone not in ("none", "own"):
        size = f", {recipe.model.image_size} px" if recipe.model.image_size else ""
        return f"{recipe.model.backbone} (pretrained{size}{probe})"
    if recipe.model.backbone == "own":
        epochs = f"{recipe.model.pretrain_epochs} epoch{'s'[: recipe.model.pretrain_epochs > 1]}"
        where = _NAMES[recipe.model.pretrain_on] if recipe.model.pretrain_on != "auto" else "Fashion-MNIST"
        return f"PreAct ResNet-18 (width {recipe.model.width}, pretrained on {where}, {epochs}{probe})"
    widths = recipe.comparison.widths or (recipe.model.width,)
    width = f"width {widths[0]}" + (f" to {widths[-1]}" if len(widths) > 1 else "")
    return f"PreAct ResNet-18 ({width})"


def summarize(recipe: Recipe, results: Results) -> Summary:
    """Summarize what there is: a run counts where it was measured at the standardized epoch of the row."""
    rows = [row for method in recipe.comparison.methods for row in _rows(recipe, method, results)]
    epochs, (reference, *others) = recipe.comparison.epochs, recipe.comparison.methods
    found = {run: record for run in results if (record := record_at(results[run], epochs)) is not None}
    differences = []
    for method in others:
        # the runs of a seed have the same initial weights and order of images
        runs = [(run, Run(recipe, reference, run.seed)) for run in found if run.method == method]
        pairs = [(found[run], found[other]) for run, other in runs if other in found]
        if pairs:
            names = ("test_accuracy", "gap")
            values = (estimate([getattr(ours, n) - getattr(theirs, n) for ours, theirs in pairs]) for n in names)
            differences.append(Difference(method, reference, epochs, *values))
    unfinished = [run.name for run in results if not record_at(results[run], run.standardized_epochs)]
    return Summary(f"{recipe.name}: {setting(recipe)}", rows, differences, unfinished)


def record_at(records: Sequence[Record], standardized_epoch: int) -> Record | None:
    return next((r for r in records if r.standardized_epoch == standardized_epoch), None)


def _rows(recipe: Recipe, method: MethodSpec, results: Results) -> Iterator[Row]:
    """Yield the row at equal compute, and one after the further epochs of a method that has them."""
    runs = [run for run in results if run.method == method]
    for epoch in sorted({recipe.comparison.epochs} | {run.standardized_epochs for run in runs}):
        records = [record for run in runs if (record := record_at(results[run], epoch)) is not None]
        if records:
            names = ("passes", "train_accuracy", "test_accuracy", "gap", "train_loss", "seconds")
            yield Row(method, epoch, *(estimate([getattr(r, name) for r in records]) for name in names))


def _verdict(value: Estimate, *, better: int) -> str:
    if value.half_width is None:
        return f"{value.mean:+.2f} points (one run: no verdict)"
    low, high = value.mean - value.half_width, value.mean + value.half_width
    return f"{value.mean:+.2f} points, 95 % interval [{low:+.2f}, {high:+.2f}]: {word(value, better=better)}"


def word(value: Estimate, *, better: int) -> str:
    """Return the direction of a difference in a word, where `better` is the good sign."""
    return {None: "no verdict", 0: "not distinguishable", better: "better", -better: "worse"}[value.sign]
