"""Train the runs of a folder by an executor, with a progress display."""

from collections.abc import Iterable

from rich.console import Console

from steppe.experiments.config.recipe import Run
from steppe.experiments.execution.executor import Executor, Job, MakeTask, failures
from steppe.experiments.execution.progress import RunProgress
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.stopping import on_signals


def train_runs(
    runs: Iterable[Run], make_task: MakeTask, executor: Executor, folder: RunFolder, console: Console
) -> str | None:
    """Train runs of a folder with a progress display; return one line on those that failed, if any."""
    jobs = [Job(run, folder.run(run)) for run in runs]
    total = sum(job.run.standardized_epochs for job in jobs)
    progress = RunProgress(console, total, task=executor.recipe.task) if executor.world.rank == 0 else Reporter()
    with progress, on_signals() as stop:
        return failures(executor.run(jobs, make_task, folder.path, progress, stop))
