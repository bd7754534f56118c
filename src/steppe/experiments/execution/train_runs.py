"""Train the runs of a folder by an executor, with a progress display."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from rich.console import Console

from steppe.experiments.config.recipe import Run
from steppe.experiments.execution.executor import Executor, Job, MakeTask, failures
from steppe.experiments.execution.logs import Log, Logging
from steppe.experiments.execution.progress import RunProgress
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.stopping import on_signals


def train_runs(
    runs: Iterable[Run],
    make_task: MakeTask,
    executor: Executor,
    folder: RunFolder,
    console: Console,
    logs: Sequence[Log] = (),
) -> str | None:
    """Train runs of a folder with a progress display and logs; return one line on those that failed, if any."""
    jobs = [Job(run, folder.run(run)) for run in runs]
    total = sum(job.run.standardized_epochs for job in jobs)
    with ExitStack() as stack:
        reporter = Reporter()
        if executor.world.rank == 0:
            reporter = progress = stack.enter_context(RunProgress(console, total, task=executor.recipe.task))
            if logs:  # by this process alone, also where others train, as not all machines may see the folder
                reporter = stack.enter_context(Logging(logs, progress, folder, console))
        stop = stack.enter_context(on_signals())
        return failures(executor.run(jobs, make_task, folder.path, reporter, stop))
