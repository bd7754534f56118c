"""Measure the flatness of the weights in a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from steppe.experiments.config.recipe import Run
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.measure_runs import objectives
from steppe.experiments.storage import checkpoint_file
from steppe.experiments.storage.checkpoints import owner
from steppe.experiments.storage.run_folder import CHECKPOINT
from steppe.experiments.tasks.images import images_task
from steppe.experiments.training.evaluation import flatness_sample
from steppe.experiments.training.stopping import Stop, Stopped
from steppe.flatness import Budget, measure

_TINY = Budget(
    m=16,
    ascent_steps=2,
    restarts=1,
    pairs=2,
    num_eigenvalues=1,
    tol=0.5,
    probes=2,
    density_probes=1,
    density_iterations=4,
)


def flatness(run: Run, folder: Path, images: Dataset, stop: Stop, *, tiny: bool) -> dict[str, Any]:
    """Measure a run's checkpoint as `steppe measure` does, without landscapes; a failure is returned as text.

    Raises Stopped when `stop` is set.
    """

    def raise_if_stopped(what: str, passes: int) -> None:
        if stop:
            raise Stopped(stop.signal)

    task, device = images_task(images, run.recipe), images.train.images.device
    network = task.model()
    network.load_state_dict(checkpoint_file.load(folder / CHECKPOINT, owner(run, 1, None))["model"])
    network.to(device)
    options = MeasuringOptions(samples=32) if tiny else MeasuringOptions()
    sample = flatness_sample(task.samples("train", run.seed), options.samples, run.seed, device)
    plain, normalized = objectives(task, network, sample, options, raise_if_stopped)
    try:
        found = measure(plain, replace(_TINY if tiny else Budget(), points=0), normalized=normalized)
    # a failed measurement must not lose the accuracies of the run
    except (FloatingPointError, ValueError, RuntimeError) as error:
        return {"failed": " ".join(str(error).split())}
    return {k: v for k, v in found.to_json().items() if "landscape" not in k}
