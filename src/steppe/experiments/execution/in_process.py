"""Train runs in this process, one after the other."""

from collections.abc import Generator, Iterable
from pathlib import Path

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import Executor, Job, Outcome
from steppe.experiments.execution.tensorboard import TensorBoard
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop
from steppe.experiments.world import World


class InProcessExecutor(Executor):
    """Trains one run at a time, in this process or in all of torchrun's processes together."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world

    def run(
        self, jobs: Iterable[Job], data: Dataset, control: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        """Train each job."""
        data = data.to(self.world.device)
        for job in jobs:
            try:
                if job.run.recipe.output.tensorboard and self.world.rank == 0:
                    with TensorBoard(control / "tensorboard", reporter) as logged:
                        train(job.run, job.folder, data, self.world, logged, stop)
                else:
                    train(job.run, job.folder, data, self.world, reporter, stop)
            except ExperimentError as error:
                if self.world.size > 1:  # the other processes may not have met it, and would wait for this one forever
                    raise
                yield Outcome(job, str(error))
            else:
                yield Outcome(job)
