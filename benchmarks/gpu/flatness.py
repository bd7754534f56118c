"""Measure the flatness of the weights in a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from steppe.experiments.config.recipe import Run
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.measure_runs import objectives
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.storage import checkpoints
from steppe.experiments.storage.checkpoints import owner
from steppe.experiments.storage.run_folder import CHECKPOINT
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

    recipe = run.recipe
    network = PreActResNet18(recipe.model.width, stem_stride=recipe.model.stem_stride, norm=recipe.model.norm)
    network.load_state_dict(checkpoints.load(folder / CHECKPOINT, owner(run, 1, None))["model"])
    network.to(images.train.images.device)
    options = MeasuringOptions(samples=32) if tiny else MeasuringOptions()
    sample = flatness_sample(images.train, options.samples, run.seed)
    plain, normalized = objectives(network, sample, options, raise_if_stopped)
    try:
        found = measure(plain, replace(_TINY if tiny else Budget(), points=0), normalized=normalized)
    # a failed measurement must not lose the accuracies of the run
    except (FloatingPointError, ValueError, RuntimeError) as error:
        return {"failed": " ".join(str(error).split())}
    return {k: v for k, v in found.to_json().items() if "landscape" not in k}
