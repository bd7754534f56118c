"""The summary of a comparison: a row for each method, the paired differences, and their verdicts."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from steppe.experiments.analysis import controls
from steppe.experiments.analysis.forgetting import Forgetting, forgetting_of
from steppe.experiments.analysis.metric_verdicts import MetricVerdict
from steppe.experiments.analysis.robustness import Robustness, robustness_of
from steppe.experiments.analysis.statistics import ERROR, Estimate, estimate
from steppe.experiments.analysis.tables import Table, TableWithNotes, bullets
from steppe.experiments.analysis.verdicts import CAVEATS, Verdict
from steppe.experiments.analysis.words import BETTER, NO_VERDICT
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.task_info import LOSS, MetricInfo, TaskInfo
from steppe.experiments.storage.files import write_atomically, write_json
from steppe.experiments.storage.records import record_at
from steppe.experiments.storage.run_folder import Results, RunFolder

_GAP_OF_WRONG_LABELS = (
    "There is no verdict on the gap: the training accuracy counts wrong labels as well, the test accuracy only correct "
    "ones, so that a network that learns no wrong label has a negative gap."
)
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


def only_finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, as JSON has no others."""
    if isinstance(value, Mapping):
        return {name: only_finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [only_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _value(name: str, form: str) -> Callable[[Row], str]:
    form_of_sd = None if form.endswith("f") else ".2g"
    return lambda row: row.measures[name].text(form, form_of_sd) if name in row.measures else "–"


class SummaryFiles(TableWithNotes):
    """A table with notes, for the terminal, summary.md and summary.json."""

    @abstractmethod
    def json(self) -> dict[str, Any]: ...

    def markdown(self) -> str:
        return self.section(1)

    def write(self, folder: RunFolder) -> None:
        write_atomically(folder.path / "summary.md", self.markdown().encode())
        write_json(folder.path / "summary.json", only_finite(self.json()))


@dataclass(frozen=True)
class Summary(SummaryFiles):
    """Every number of a comparison, once."""

    title: str
    rows: Sequence[Row]
    verdicts: Sequence[MetricVerdict]
    """For each method, its verdict in the deciding metric against the first one, and beside its controls."""
    gaps: Sequence[MetricVerdict]
    """For each of the same methods, its verdict in the generalization gap; none where training labels are wrong."""
    unfinished: Sequence[str]
    task: TaskInfo
    standardized_epochs: int
    """The compute at which methods are compared."""
    flatness: Sequence[Verdict] = ()
    """The verdicts on flatness, where it was measured."""
    robustness: Robustness | None = None
    """Corrupted images, calibration and rounded weights, in comparisons of images."""
    forgetting: Forgetting | None = None
    """The first task after training on a second one, where there was one."""
    advice: Sequence[str] = ()
    """Sentences: which method to take, at what price, how sure that is, and what to try next."""

    @property
    def labels(self) -> Mapping[str, str]:
        """The names of methods for readers."""
        return {str(row.method): row.method.label for row in self.rows}

    def verdicts_with_gaps(self) -> list[tuple[MetricVerdict, MetricVerdict | None]]:
        """Return each verdict in the deciding metric with that in the gap, or with None where there is none."""
        gaps: Sequence[MetricVerdict | None] = self.gaps or [None] * len(self.verdicts)
        return list(zip(self.verdicts, gaps, strict=True))

    def verdicts_with_controls(self) -> list[MetricVerdict]:
        """Return the verdicts that have controls, in the unit of the deciding metric, grouped by method."""
        robustness = [] if self.robustness is None else self.robustness.main_verdicts()
        forgetting = [] if self.forgetting is None else self.forgetting.verdicts
        unit = self.task.deciding.unit
        every = [*self.verdicts, *robustness, *forgetting]
        found = [verdict for verdict in every if len(verdict.comparisons) > 1 and verdict.metric.unit == unit]
        methods = list(dict.fromkeys(verdict.method for verdict in found))
        return sorted(found, key=lambda verdict: methods.index(verdict.method))

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text, with a cell for each of `columns`."""
        return [[column.text(row) for column in columns(self.task)] for row in self.rows]

    def table(self) -> Table:
        shown, rows = columns(self.task), self.cells
        extra = sorted((i for i, column in enumerate(shown) if column.extra), key=lambda i: shown[i].extra)
        return Table([c.heading for c in shown], {"": rows}, title=self.title, optional=tuple((i,) for i in extra))

    def notes(self) -> Iterator[str]:
        labels = self.labels
        for verdict, gap in self.verdicts_with_gaps():
            ours, base, seeds = (
                labels[verdict.method],
                labels[verdict.base],
                verdict.first.difference.n + verdict.first.difference.lost,
            )
            yield (
                f"{ours} against {base} at {self.standardized_epochs} standardized epochs, {seeds} paired "
                f"run{'s'[: seeds > 1]}: test {verdict.metric.name} {verdict.first.statement(verdict.metric)}"
                + ("." if gap is None else f"; {gap.metric.name} {gap.first.statement(gap.metric)}.")
            )
            if gap is not None:
                yield from _share_of_training(verdict, gap)
            if sentence := verdict.controls_sentence():
                yield f"{base}'s controls: {ours} {sentence}."
        if self.verdicts and not self.gaps:
            yield _GAP_OF_WRONG_LABELS
        yield from self._certainty()
        if self.unfinished:
            yield (
                "Not finished, and neither in the table nor in the verdicts where it has not come so far: "
                f"{', '.join(self.unfinished)}. If its loss diverged, its method is worse than its other runs show."
            )

    def _certainty(self) -> Iterator[str]:
        """Yield how often these verdicts are wrong, and what their intervals mean."""
        if all(verdict.word == NO_VERDICT for verdict in (*self.verdicts, *self.gaps)):
            return
        methods = max(verdict.first.difference.comparisons for verdict in self.verdicts)
        any_of = "" if methods == 1 else f" for any of the {methods} methods"
        share = f"{100 * ERROR:g} %"
        in_gap = f", and one in the generalization gap in at most another {share}" if self.gaps else ""
        of_each = " of each" if self.gaps else ""
        yield (
            f"By chance alone, a difference in test {self.task.deciding.name} is found{any_of} in at most {share} of "
            f"comparisons{in_gap}." + (f" The intervals{of_each} hold for all methods at once." if methods > 1 else "")
        )

    def markdown(self) -> str:
        advice = ["", "## Advice", "", *bullets(self.advice), ""] if self.advice else []
        text = super().markdown() + "\n".join(advice)
        text += "" if self.robustness is None else self.robustness.markdown()
        text += "" if self.forgetting is None else self.forgetting.markdown()
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
        if self.forgetting is not None:
            self.forgetting.show(console)
        for verdict in self.flatness:
            verdict.show(console)

    def json(self) -> dict[str, Any]:
        """Return the summary as JSON, with the verdicts in words."""
        values: dict[str, Any] = {
            "title": self.title,
            "task": asdict(self.task),
            "standardized_epochs": self.standardized_epochs,
            "rows": [
                {
                    "method": str(row.method),
                    "standardized_epoch": row.standardized_epoch,
                    "passes": asdict(row.passes),
                    **{name: asdict(value) for name, value in row.measures.items()},
                    "seconds": asdict(row.seconds),
                }
                for row in self.rows
            ],
            "verdicts": [verdict.json() for verdict in self.verdicts],
            "gaps": [verdict.json() for verdict in self.gaps],
            "robustness": [] if self.robustness is None else self.robustness.json(),
            "forgetting": [] if self.forgetting is None else self.forgetting.json(),
            "advice": list(self.advice),
            "notes": list(self.notes()),
            "unfinished": list(self.unfinished),
        }
        return values | ({"flatness": [verdict.json() for verdict in self.flatness]} if self.flatness else {})


def _share_of_training(verdict: MetricVerdict, gap: MetricVerdict) -> Iterator[str]:
    """Say how much of a smaller gap is worse training data, as a gap closes at both ends."""
    metric, test, closed = verdict.metric, verdict.first.difference, gap.first.difference
    lost = -(closed.mean + metric.better * test.mean)
    if gap.word == BETTER and lost > 0 and (test.n, test.lost) == (closed.n, closed.lost):
        unit = f" {metric.unit_of_change}" if metric.unit else ""
        way = "lower" if metric.higher_is_better else "higher"
        whole, part = (f"{value:{metric.form}}" for value in (-closed.mean, lost))
        if metric.better * test.mean >= 0:
            yield f"The gap is {whole}{unit} smaller; {part} of them are {way} training {metric.name}."
        else:
            yield (
                f"The gap is {whole}{unit} smaller because training {metric.name} is {part}{unit} {way}; test "
                f"{metric.name} is {way}, too."
            )


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
    then = f", then {recipe.forgetting.description}" if recipe.forgetting.then else ""
    return f"{base}, batch {training.batch_size}{rho}{then}"


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
    name = "ViT" if recipe.model.network == "vit" else "PreAct ResNet-18"
    return f"{name} ({width})"


def summarize(recipe: Recipe, results: Results) -> Summary:
    """Summarize what there is: a run counts where it was measured at the standardized epoch of the row."""
    rows = [row for method in recipe.comparison.methods for row in _rows(recipe, method, results)]
    unfinished = [run.name for run in results if not record_at(results[run], run.standardized_epochs)]
    return Summary(
        title=f"{recipe.name}: {setting(recipe)}",
        rows=rows,
        verdicts=controls.verdicts(recipe, results),
        gaps=controls.gap_verdicts(recipe, results),
        unfinished=unfinished,
        task=recipe.task,
        standardized_epochs=recipe.comparison.epochs,
        robustness=robustness_of(recipe, results),
        forgetting=forgetting_of(recipe, results),
    )


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
