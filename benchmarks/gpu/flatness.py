"""How flat the weights of a checkpoint are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from steppe.experiments import checkpoints
from steppe.experiments.data import Dataset
from steppe.experiments.folder import CHECKPOINT
from steppe.experiments.measure import Sampling, objectives
from steppe.experiments.models import preact_resnet18
from steppe.experiments.recipes import Unit
from steppe.experiments.sharpness import flatness_sample
from steppe.experiments.stopping import Stop, Stopped
from steppe.experiments.training import owner
from steppe.flatness import Effort, measure

_TINY = Effort(m=16, steps=2, restarts=1, pairs=2, top=1, tol=0.5, probes=2, density_probes=1, density_steps=4)


def flatness(unit: Unit, folder: Path, images: Dataset, stop: Stop, *, tiny: bool) -> dict[str, Any]:
    """Measure the run's checkpoint as `steppe measure` does, without landscapes; what failed says why.

    Raises Stopped when that was asked for.
    """

    def pause(what: str, passes: int) -> None:
        if stop:
            raise Stopped(stop.signal)

    recipe = unit.recipe
    network = preact_resnet18(recipe.width, stem_stride=recipe.stem_stride, norm=recipe.norm)
    network.load_state_dict(checkpoints.load(folder / CHECKPOINT, owner(unit, 1, None))["model"])
    network.to(images.train.images.device)
    sampling = Sampling(samples=32) if tiny else Sampling()
    sample = flatness_sample(images.train, sampling.samples, unit.seed)
    plain, normalised = objectives(network, sample, sampling, pause)
    try:
        found = measure(plain, replace(_TINY if tiny else Effort(), points=0), normalised=normalised)
    except (FloatingPointError, ValueError, RuntimeError) as error:  # the run's accuracies are worth more than this
        return {"failed": " ".join(str(error).split())}
    return {k: v for k, v in found.to_json().items() if "landscape" not in k}
