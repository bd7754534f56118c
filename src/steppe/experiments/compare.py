"""The main job: train every unit of a recipe, and say who generalises better."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from steppe.experiments import data, figures
from steppe.experiments.board import board
from steppe.experiments.environment import describe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.executors import Executor, Job, Where, failures, start
from steppe.experiments.files import write_json
from steppe.experiments.finetune import settled, with_start
from steppe.experiments.folder import RunFolder
from steppe.experiments.progress import reporter
from steppe.experiments.recipes import Recipe
from steppe.experiments.stopping import on_signals
from steppe.experiments.summary import Summary, summarise

__all__ = ["compare", "plot", "report", "sign"]

_HERE = Where()


def compare(recipe: Recipe, command: Sequence[str], console: Console, where: Where = _HERE) -> Summary | None:
    """Train what is not trained yet, then write and show the summary and the figures.

    `command` is what the user typed, for the record. Returns None in all processes but the first. Raises Stopped when
    somebody asked to stop, and ExperimentError or DataError with one clear line; a run that failed does not end the
    others, and is told of at the end.
    """
    recipe = settled(recipe, console)
    folder = RunFolder(recipe.folder)
    with start(recipe, where, console) as executor:
        recipe, world = executor.recipe, executor.world
        with folder.locked() if world.rank == 0 else nullcontext():
            if world.rank == 0:
                folder.claim(recipe, world.size)
                sign(folder.path / "environment.json", command, console)
            world.barrier()
            failed = _train(executor, folder, console, together=where.on == "ray")
            if world.rank > 0:
                return None
            summary = report(folder, recipe, console)
    if failed is not None:
        raise ExperimentError(failed)
    return summary


def plot(path: Path, console: Console) -> Summary:
    """Draw the figures and write the summary of a run folder again, from what is in it."""
    folder = RunFolder(path)
    return report(folder, folder.recipe(), console)


def report(folder: RunFolder, recipe: Recipe, console: Console) -> Summary:
    """Write and show the summary, and draw the figures."""
    results = folder.results(recipe)
    summary = summarise(recipe, results)
    summary.write(folder)
    figures.draw(recipe, results, folder.figures)
    summary.show(console)
    console.print(f"Figures: {folder.figures}", highlight=False, markup=False, soft_wrap=True)
    return summary


def _train(executor: Executor, folder: RunFolder, console: Console, *, together: bool) -> str | None:
    """Train every unit; say which ones failed, if any did."""
    recipe, world = executor.recipe, executor.world
    if world.rank > 0:
        world.barrier()  # the first process downloads, if it must; the others find what it got
    dataset = data.load(recipe.dataset, recipe.data_dir)
    if world.rank == 0:
        world.barrier()
    dataset = with_start(dataset, executor, folder.path, console)
    units = list(recipe.units())
    if together:
        teller = board(sum(unit.standardized_epochs for unit in units), console)
    else:
        teller = reporter(recipe, speaks=world.rank == 0, console=console)
    jobs = [Job(unit, folder.unit(unit)) for unit in units]
    with teller, on_signals() as stop:
        return failures(list(executor.run(jobs, dataset, folder.path, teller, stop)))


def sign(path: Path, command: Sequence[str], console: Console) -> None:
    """Add this session to the folder's record of where it was run, and note when the software changed."""
    now = describe(command)
    try:
        sessions = json.loads(path.read_text()) if path.exists() else []
    except ValueError:  # it is only a record: a damaged one is begun again
        sessions = []
    before = sessions[-1] if sessions else now
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in ("steppe", "torch", "cpu", "gpu") if before.get(k) != now[k]]
    if changed:
        console.print(f"Note: since this folder's last session: {', '.join(changed)}. Bits may differ.")
    write_json(path, [*sessions, now])
