"""Train every run of a recipe and report which method generalizes better."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from steppe.experiments.analysis import controls, double_descent
from steppe.experiments.analysis.double_descent import DoubleDescent
from steppe.experiments.analysis.summary import Summary, summarize
from steppe.experiments.analysis.verdicts import Verdict, read_flatness, verdicts
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import ExecutionOptions, Executor
from steppe.experiments.execution.launch import start_executor
from steppe.experiments.execution.logs import Log, make_logs
from steppe.experiments.execution.prepared_task import prepare_task
from steppe.experiments.execution.pretraining import resolve_pretraining
from steppe.experiments.execution.progress import print_line
from steppe.experiments.execution.train_runs import train_runs
from steppe.experiments.figures import double_descent as double_descent_figure
from steppe.experiments.report import page
from steppe.experiments.storage.environment import record_session
from steppe.experiments.storage.run_folder import Results, RunFolder
from steppe.experiments.tasks.digests import digests_of_object
from steppe.experiments.tasks.load import with_task
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.trial import try_methods

_LOCAL = ExecutionOptions()


def compare(
    recipe: Recipe,
    command: Sequence[str],
    console: Console,
    execution: ExecutionOptions = _LOCAL,
    task: Task | None = None,
    logs: Sequence[Log] = (),
) -> Summary | DoubleDescent | None:
    """Train the runs that are not finished, then write and show the summary and the figures.

    `command` is the words of the command line, for the record; `task` is one that has no name by which it could be
    imported; `logs` are those beside the ones that the recipe names. Returns None in all processes but the first.

    Raises Stopped on a signal, ExperimentError with one clear line; the failure of a run is raised after the others
    are trained.
    """
    logs = [*make_logs(recipe.output.log), *logs]  # a missing package is an error before anything is trained
    recipe, task = with_task(resolve_pretraining(recipe, console), task)
    runs = max(len(list(member.runs())) for member in [recipe, *recipe.members()])
    with start_executor(recipe, execution, console, max_runs=runs) as executor:
        summary, failed = _train_and_report(executor.recipe, executor, command, console, task, logs)
    if failed and summary is not None:
        raise ExperimentError("; ".join(failed))
    return summary


def plot(path: Path, console: Console) -> Summary | DoubleDescent:
    """Draw the figures and write the summary of a run folder again, from its files."""
    folder = RunFolder(path)
    recipe = folder.recipe().replace(out=path)  # it may have been moved
    for member in recipe.members():
        if member.folder.exists():
            report(RunFolder(member.folder), member, console)
    return report(folder, recipe, console)


def report(folder: RunFolder, recipe: Recipe, console: Console) -> Summary | DoubleDescent:
    """Write and show the summary, and draw the figures."""
    summary: Summary | DoubleDescent
    if recipe.comparison.widths:
        summary = double_descent.summarize(recipe)
        double_descent_figure.draw(recipe, summary, folder.figures)
    else:
        results = folder.results(recipe)
        summary = summarize_folder(folder, recipe, results, console)
        page.write(folder, recipe, results, summary)
    summary.write(folder)
    summary.show(console)
    print_line(console, f"Figures: {folder.figures}")
    if not recipe.comparison.widths:
        print_line(console, f"Report: {folder.path / page.FILE}")
    return summary


def summarize_folder(folder: RunFolder, recipe: Recipe, results: Results, console: Console) -> Summary:
    """Summarize the measurements of a folder, with the advice and the flatness."""
    summary = summarize(recipe, results)
    return replace(
        summary,
        advice=controls.advice(recipe, results, summary.verdicts),
        flatness=_flatness(folder, recipe, console),
    )


def _flatness(folder: RunFolder, recipe: Recipe, console: Console) -> list[Verdict]:
    """Return the verdicts on flatness; none if it was not measured, or not with the same options."""
    found = read_flatness(folder, recipe)
    try:
        return verdicts(recipe, found)
    except ExperimentError as error:
        print_line(console, f"No verdict on flatness: {error}")
        return []


def _train_and_report(
    recipe: Recipe,
    executor: Executor,
    command: Sequence[str],
    console: Console,
    task: Task | None,
    logs: Sequence[Log],
) -> tuple[Summary | DoubleDescent | None, list[str]]:
    """Train every run of a comparison, or of its members, and report; return the failures as well."""
    folder, world = RunFolder(recipe.folder), executor.world
    with folder.locked() if world.rank == 0 else nullcontext():
        before = folder.configuration() if world.rank == 0 else None
        if world.rank == 0:
            folder.claim(recipe, world.size)
            record_session(
                folder.path / "environment.json", command, console, recipe.data.task, digests_of_object(task)
            )
        world.barrier()
        failed: list[str] = []
        for member in recipe.members():
            _, reasons = _train_and_report(member, executor, command, console, task, logs)
            failed += [f"width {member.model.width}: {reason}" for reason in reasons]
        if not recipe.comparison.widths:
            make_task = prepare_task(executor, folder.path, console, task)
            if recipe.data.task:
                try:
                    try_methods(recipe, make_task(recipe), folder, world)
                except ExperimentError:
                    if before is not None:  # else the folder would be reported with methods that cannot be trained
                        folder.configure(before)
                    raise
            reason = train_runs(recipe.runs(), make_task, executor, folder, console, logs)
            failed += [] if reason is None else [reason]
        summary = report(folder, recipe, console) if world.rank == 0 else None
        world.barrier()  # the others may read the folder
        return summary, failed
