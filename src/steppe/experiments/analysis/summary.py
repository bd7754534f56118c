"""The summary of a comparison: a row for each method, the paired differences, and their verdicts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from steppe.experiments.analysis.metric_verdicts import MetricVerdict, word
from steppe.experiments.analysis.robustness import Robustness, robustness_of
from steppe.experiments.analysis.statistics import Decision, Estimate, decide, estimate
from steppe.experiments.analysis.tables import Table, bullets
from steppe.experiments.analysis.verdicts import CAVEATS, Verdict
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.config.task_info import LOSS, MetricInfo, TaskInfo
from steppe.experiments.storage.files import write_atomically, write_json
from steppe.experiments.storage.records import Record, record_at
from steppe.experiments.storage.run_folder import Results, RunFolder

_NAMES = {"sample": "a sample of Fashion-MNIST", "fashion-mnist": "Fashion-MNIST", "digits": "digits"}


@dataclass(frozen=True)
class Row:
    """One method after so many standardized epochs: mean and standard deviation over its runs."""

    method: MethodSpec
    standardized_epoch: int
    passes: Estimate
    measures: Mapping[str, Estimate]
    """By the names of `Record.measures`: the metrics of each split, its loss, and the gap."""
    seconds: Estimate


@dataclass(frozen=True)
class Column:
    """A column of the table: its name and unit, the text of a row, and the heading in a narrow table, in two lines."""

    name: str
    unit: str
    text: Callable[[Row], str]
    heading: str
    extra: int = 0
    """The order in which a narrow console leaves columns out; 0 for those that stay."""


def columns(task: TaskInfo) -> list[Column]:
    """Return the columns of a comparison of a task."""

    def measured(split: str, metric: MetricInfo, form: str = "", *, extra: int = 0) -> Column:
        name, heading = f"{split}_{metric.name}", f"{split}\n{metric.name} {metric.unit}".rstrip()
        return Column(f"{split} {metric.name}", metric.unit, _value(name, form or metric.form), heading, extra)

    deciding, unit = task.deciding, task.deciding.unit_of_change
    return [
        Column("method", "", lambda row: row.method.label, "method"),
        Column("standardized epochs", "", lambda row: str(row.standardized_epoch), "std.\nepochs", extra=3),
        Column("passes a step", "", lambda row: f"{row.passes.mean:.2f}", "passes\na step"),
        measured("train", deciding),
        measured("test", deciding),
        *(measured("test", metric, extra=4) for metric in task.measured[1:]),
        Column("gap", unit, _value("gap", deciding.form), f"gap,\n{unit}" if unit else "gap"),
        *([] if deciding is LOSS else [measured("train", LOSS, ".3f", extra=1)]),
        Column("time", "s", lambda row: f"{row.seconds.mean:.0f}", "time,\ns", extra=2),
        Column("runs", "", lambda row: str(row.seconds.n), "runs"),
    ]


def _value(name: str, form: str) -> Callable[[Row], str]:
    form_of_sd = None if form.endswith("f") else ".2g"
    return lambda row: row.measures[name].text(form, form_of_sd) if name in row.measures else "–"


@dataclass(frozen=True)
class Difference:
    """A method minus the first one, paired by seed, at equal compute, in units of the deciding metric."""

    method: MethodSpec
    reference: MethodSpec
    standardized_epoch: int
    test: Decision
    """Of the deciding metric on the test data."""
    gap: Decision
    metric: MetricInfo

    def sentence(self) -> str:
        runs, unit = self.gap.n, self.metric.unit_of_change
        return (
            f"{self.method.label} against {self.reference.label} at {self.standardized_epoch} standardized epochs, "
            f"{runs} paired run{'s'[: runs > 1]}: test {self.metric.name} "
            f"{_verdict(self.test, self.metric.form, unit, better=self.metric.better)}; "
            f"generalization gap {_verdict(self.gap, self.metric.form, unit, better=-1)}."
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
    task: TaskInfo
    flatness: Sequence[Verdict] = ()
    """The verdicts on flatness, where it was measured."""
    robustness: Robustness | None = None
    """Corrupted images, calibration and rounded weights, in comparisons of images."""
    verdicts: Sequence[MetricVerdict] = ()
    """For each method, its verdict in the deciding metric against the first one, and beside its controls."""
    advice: Sequence[str] = ()
    """Sentences: which method to take, at what price, how sure that is, and what to try next."""

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text, with a cell for each of `columns`."""
        return [[column.text(row) for column in columns(self.task)] for row in self.rows]

    def table(self) -> Table:
        shown, rows = columns(self.task), self.cells
        extra = sorted((i for i, column in enumerate(shown) if column.extra), key=lambda i: shown[i].extra)
        return Table([c.heading for c in shown], {"": rows}, title=self.title, optional=tuple((i,) for i in extra))

    def notes(self) -> Iterator[str]:
        controls = {verdict.method: verdict.controls_sentence() for verdict in self.verdicts}
        for difference in self.differences:
            yield difference.sentence()
            if sentence := controls.get(str(difference.method)):
                yield f"{difference.reference.label}'s controls: {difference.method.label} {sentence}."
        corrected = max((difference.test.comparisons for difference in self.differences), default=1)
        if corrected > 1:
            yield (
                f"The verdicts of each measure are corrected for {corrected} methods, by Holm's procedure, and its "
                "intervals hold for all of them at once."
            )
        if self.unfinished:
            yield f"Not finished, and not in the table where it has not come so far: {', '.join(self.unfinished)}."

    def markdown(self) -> str:
        advice = ["", "## Advice", "", *bullets(self.advice), ""] if self.advice else []
        text = super().markdown() + "\n".join(advice)
        text += "" if self.robustness is None else self.robustness.markdown()
        if not self.flatness:
            return text
        flatness = ["", "## Flatness", "", *(f"{verdict.markdown()}\n" for verdict in self.flatness), *bullets(CAVEATS)]
        return text + "\n".join([*flatness, ""])

    def show(self, console: Console) -> None:
        super().show(console)
        for sentence in self.advice:
            console.print(f"Advice: {sentence}", highlight=False, markup=False, soft_wrap=False, emoji=False)
        if self.robustness is not None:
            self.robustness.show(console)
        for verdict in self.flatness:
            verdict.show(console)

    def json(self) -> dict[str, Any]:
        """Return the summary as JSON, with the verdicts in words."""
        values = asdict(self) | {"flatness": [verdict.json() for verdict in self.flatness]}
        values |= {"verdicts": [verdict.json() for verdict in self.verdicts], "advice": list(self.advice)}
        if not self.flatness:
            del values["flatness"]
        values["robustness"] = [] if self.robustness is None else self.robustness.json()
        values["rows"] = [
            {
                "method": str(row.method),
                "standardized_epoch": row.standardized_epoch,
                "passes": asdict(row.passes),
                **{name: asdict(value) for name, value in row.measures.items()},
                "seconds": asdict(row.seconds),
            }
            for row in self.rows
        ]
        values["differences"] = [
            {
                "method": str(difference.method),
                "reference": str(difference.reference),
                "standardized_epoch": difference.standardized_epoch,
                f"test_{difference.metric.name}": _json(difference.test),
                "gap": _json(difference.gap),
                "verdict": difference.sentence(),
            }
            for difference in self.differences
        ]
        return values


def setting(recipe: Recipe) -> str:
    """Describe in one line the network, the data and the optimizer."""
    if recipe.data.task:
        return f"{recipe.task.description}: {_training(recipe)}"
    data = _NAMES[recipe.data.dataset]
    if recipe.data.shots is not None:
        data += f", {recipe.data.shots} image{'s'[: recipe.data.shots > 1]} a class"
    if recipe.data.label_noise:
        data += f", {100 * recipe.data.label_noise:g} % wrong training labels"
        data += " (the next class)" if recipe.data.label_noise_kind == "next" else ""
    return f"{_network(recipe)} on {data}: {_training(recipe)}"


def _training(recipe: Recipe) -> str:
    """Describe the base optimizer, its schedule and the radius."""
    training = recipe.training
    base = {"own": "its own optimizer", "adamw": "AdamW"}.get(training.base, training.base.upper())
    if training.lr is not None:
        base += f", lr {training.lr:g}"
    if training.head_lr is not None:
        base += f" (head {training.head_lr:g})"
    if training.schedule != "constant":
        base += f" ({'its own' if training.schedule == 'own' else training.schedule} schedule)"
    if training.warmup:
        base += f", {100 * training.warmup:g} % warm-up"
    if recipe.base_momentum:
        base += f", {'Nesterov ' if training.nesterov else ''}momentum {recipe.base_momentum:g}"
    if training.weight_decay and (recipe.data.task or training.base != "sgd"):
        base += f", weight decay {training.weight_decay:g}"
    if training.clip is not None:
        base += f", gradients clipped at {training.clip:g}"
    # a rho that every method replaces by its own would only mislead
    takes_it = any(
        "rho" in s.definition.arguments and "rho" not in dict(s.overrides) for s in recipe.comparison.methods
    )
    rho = f", rho {training.rho:g}" if takes_it else ""
    return f"{base}, batch {training.batch_size}{rho}"


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
    metric, pairs = recipe.task.deciding, dict[MethodSpec, list[tuple[Record, Record]]]()
    for method in others:
        # the runs of a seed have the same initial weights and order of images
        runs = [(run, Run(recipe, reference, run.seed)) for run in found if run.method == method]
        if paired := [(found[run], found[other]) for run, other in runs if other in found]:
            pairs[method] = paired
    test, gap = (
        decide([[(ours[name], theirs[name]) for ours, theirs in of] for of in pairs.values()])
        for name in (f"test_{metric.name}", "gap")
    )
    differences = [
        Difference(method, reference, epochs, of_test, of_gap, metric)
        for method, of_test, of_gap in zip(pairs, test, gap, strict=True)
    ]
    unfinished = [run.name for run in results if not record_at(results[run], run.standardized_epochs)]
    title, robustness = f"{recipe.name}: {setting(recipe)}", robustness_of(recipe, results)
    return Summary(title, rows, differences, unfinished, recipe.task, robustness=robustness)


def _rows(recipe: Recipe, method: MethodSpec, results: Results) -> Iterator[Row]:
    """Yield the row at equal compute, and one after the further epochs of a method that has them."""
    runs = [run for run in results if run.method == method]
    for epoch in sorted({recipe.comparison.epochs} | {run.standardized_epochs for run in runs}):
        records = [record for run in runs if (record := record_at(results[run], epoch)) is not None]
        if records:
            names = [name for name in records[0].measures if all(name in r.measures for r in records)]
            measures = {name: estimate([r[name] for r in records]) for name in names}
            passes, seconds = (estimate([r[name] for r in records]) for name in ("passes", "seconds"))
            yield Row(method, epoch, passes, measures, seconds)


def _verdict(value: Decision, form: str, unit: str, *, better: int) -> str:
    after = f" {unit}" if unit else ""
    if value.interval is None:
        reason = f"{value.lost} not finite" if value.lost else "one run"
        return f"{value.mean:+{form}}{after} ({reason}: no verdict)"
    low, high = value.interval
    interval = f"[{low:+{form}}, {high:+{form}}]"
    return f"{value.mean:+{form}}{after}, 95 % interval {interval}: {word(value, better=better)}"


def _json(value: Decision) -> dict[str, Any]:
    return {**asdict(value), "half_width_95": value.half_width}
