"""The numbers of every method and of the base's controls: at equal compute, at equal steps, at its best, averaged."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from steppe.experiments.analysis.advice import Candidate, advise
from steppe.experiments.analysis.metric_verdicts import (
    AVERAGED,
    BEST_AVERAGED,
    BEST_HELD_OUT,
    CONTROLS,
    EQUAL_COMPUTE,
    EQUAL_STEPS,
    BySeed,
    Control,
    MetricVerdict,
    judge,
)
from steppe.experiments.analysis.statistics import estimate, is_usable, rank
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.config.task_info import MetricInfo
from steppe.experiments.storage.records import AVERAGE, HALVES, Record, record_at
from steppe.experiments.storage.records import AVERAGED as AVERAGED_SUFFIX
from steppe.experiments.storage.run_folder import Results


def verdicts(recipe: Recipe, results: Results) -> list[MetricVerdict]:
    """Judge every method against the first one, by the deciding metric and beside every control that was measured."""
    numbers = {control: pairs(recipe, results, control) for control in CONTROLS.values()}
    return judge(recipe.task.deciding, str(recipe.comparison.methods[0]), numbers)


def gap_verdicts(recipe: Recipe, results: Results) -> list[MetricVerdict]:
    """Judge every method against the first one by the generalization gap, at equal compute.

    Where training labels are wrong there is no verdict: training and test accuracy are of different labels then, and a
    network that learned the correct ones only would have a negative gap.
    """
    if recipe.data.label_noise:
        return []
    gap = MetricInfo("generalization gap", higher_is_better=False, unit=recipe.task.deciding.unit)
    numbers = {EQUAL_COMPUTE: pairs(recipe, results, EQUAL_COMPUTE, "gap")}
    return judge(gap, str(recipe.comparison.methods[0]), numbers)


def advice(recipe: Recipe, results: Results, judged: Sequence[MetricVerdict]) -> list[str]:
    """Say which method and rho to take on this task, at what price, how sure that is, and what to try next."""
    candidates, test = {}, f"test_{recipe.task.deciding.name}"
    for method in recipe.comparison.methods:
        of_method = [records for run, records in results.items() if run.method == method]
        ends = [record_at(records, recipe.comparison.epochs) for records in of_method]
        found = [record for record in ends if record is not None]
        if found:
            candidates[str(method)] = Candidate(
                label=method.label,
                name=method.averaged_name,
                passes=estimate([record.passes for record in found]).mean,
                seconds=estimate([record.seconds for record in found]).mean,
                rho=method.rho(recipe.training.rho) if "rho" in method.definition.arguments else None,
                options=method.options_but("rho"),
                metric_fails=any(not is_usable(record[test]) and is_usable(record["test_loss"]) for record in found),
            )
    return [*advise(judged, candidates), *_without_equal_steps(recipe, results), *_without_average(recipe, results)]


def _without_equal_steps(recipe: Recipe, results: Results) -> Iterator[str]:
    """Name the seeds of the base without a measurement after as many steps as a method makes that was added later."""
    if not recipe.training.is_constant:  # a training of its own, which is added, too
        return
    base, *others = recipe.comparison.methods
    compared, beside = (pairs(recipe, results, control) for control in (EQUAL_COMPUTE, EQUAL_STEPS))
    for method in others:
        seeds = sorted(compared.get(str(method), {}).keys() - beside.get(str(method), {}).keys())
        if seeds and recipe.comparison.share_of_as_many_steps(base, method) < 1:
            yield (
                f"{base.label} was not measured after as many steps as {method.label} makes for {_named(seeds)}, "
                "trained before it was compared: for that control, compare them in a new folder."
            )


def _without_average(recipe: Recipe, results: Results) -> Iterator[str]:
    """Name the seeds of the base without averaged weights, as they were trained before others were compared with it."""
    base, *others = recipe.comparison.methods
    averaged = replace(base, average=AVERAGE)
    # a CUDA graph updates no average
    if not others or base.average or base.passes != 1 or recipe.hardware.cuda_graphs or averaged in others:
        return
    ends = {run.seed: record_at(of, recipe.comparison.epochs) for run, of in results.items() if run.method == base}
    name = f"test_{recipe.task.deciding.name}{AVERAGED_SUFFIX}"
    seeds = [seed for seed, end in ends.items() if end is not None and name not in end.measures]
    if seeds:
        yield (
            f"The averaged weights of {base.label} were not measured for {_named(seeds)}, trained before others were "
            f"compared with it: add {averaged} to the methods for that control."
        )


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'s'[: len(seeds) > 1]} {', '.join(map(str, seeds))}"


def pairs(recipe: Recipe, results: Results, control: Control, name: str = "") -> dict[str, BySeed]:
    """Return the numbers of each method at the end of equal compute and of the base's control, by seed.

    They are of the measure `name` of a record, by default the deciding metric on the test data; runs in which it was
    not measured are left out.
    """
    name = name or f"test_{recipe.task.deciding.name}"
    found: dict[str, dict[int, tuple[float, float]]] = {str(method): {} for method in recipe.comparison.methods[1:]}
    for run, records in results.items():
        ours = record_at(records, recipe.comparison.epochs)
        if str(run.method) in found and ours is not None and name in ours.measures:
            theirs = _base_number(recipe, results, control, run, name)
            if theirs is not None:
                # the runs of a seed have the same initial weights and order of samples
                found[str(run.method)][run.seed] = (ours[name], theirs)
    return {method: by_seed for method, by_seed in found.items() if by_seed}


def _base_number(recipe: Recipe, results: Results, control: Control, run: Run, name: str) -> float | None:
    """Return the base's number for a control of a run; None if it was not measured."""
    comparison, reference = recipe.comparison, recipe.comparison.methods[0]
    of_base = Run(recipe, reference, run.seed)
    records = results.get(of_base, [])
    averaged_base = replace(reference, average=AVERAGE)
    averaged = [] if averaged_base in (reference, run.method) else results.get(Run(recipe, averaged_base, run.seed), [])
    if control == BEST_AVERAGED:  # measured during training where the averaged base is one of the methods
        records = averaged
    if control in (BEST_HELD_OUT, BEST_AVERAGED):
        points = {point for point in of_base.regular_grid if point <= comparison.epochs}
        return _best_held_out(recipe, [record for record in records if record.standardized_epoch in points])
    record = record_at(records, comparison.epochs)
    if control == EQUAL_STEPS:
        share = comparison.share_of_as_many_steps(reference, run.method)
        if share >= 1:
            return None
        if not recipe.training.is_constant:  # else a shorter run is the beginning of a longer one
            records = results.get(Run(recipe, replace(reference, share=share), run.seed), [])
        record = record_at(records, comparison.epochs_of_as_many_steps(reference, run.method))
    if control == AVERAGED:
        beside = None if record is None else record.measures.get(name + AVERAGED_SUFFIX)
        if beside is not None:
            return beside
        record = record_at(averaged, comparison.epochs)  # in folders from before a measure was taken beside the base's
    return None if record is None else record.measures.get(name)


def _best_held_out(recipe: Recipe, records: Sequence[Record]) -> float | None:
    """Return the test metric at the moment that is best on held-out data.

    Without validation data, the moment is chosen on one half of the test data and judged on the other, both ways; None
    if a half has no value where the whole has one, as that of a metric of few positive samples.
    """
    metric = recipe.task.deciding
    test, held_out = f"test_{metric.name}", f"validation_{metric.name}"
    if not records:
        return None
    if all(held_out in record.measures for record in records):
        best: float = max(records, key=lambda r: rank(metric.better * r[held_out]))[test]
        return best
    halves = [test + half for half in HALVES]
    if len(records) < 2 or not all(half in record.measures for record in records for half in halves):
        return None
    if any(is_usable(record[test]) and not is_usable(record[half]) for record in records for half in halves):
        return None
    first, second = halves
    by_first = max(records, key=lambda record: rank(metric.better * record[first]))
    by_second = max(records, key=lambda record: rank(metric.better * record[second]))
    return float(by_first[second] + by_second[first]) / 2
