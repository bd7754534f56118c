"""The network of a run, and its loss as a step function uses it, with a count of all samples.

A step function is a subclass of `StepFunction`. With a builder of `steppe.closures` its `step` is one line:

    return self.optimizer.step(closures.fraction(self.optimizer, forward, batch.tensors, fraction=0.25))
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.experiments.config.methods import RunContext
from steppe.experiments.config.recipe import Run
from steppe.experiments.data.batches import Batch
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.world import World

FORWARD_ONLY = Fraction(1, 3)
"""Cost of a sample without a backward pass, which does about twice the work of the forward pass."""


def build_network(run: Run, data: Dataset) -> nn.Module:
    """Build the network with its initial weights, drawn from torch's generator."""
    model = run.recipe.model
    if (data.backbone is None) != (model.backbone == "none"):
        raise RuntimeError(
            f"backbone={model.backbone}, but the data has {data.backbone}: load it by pretraining.with_backbone"
        )
    if data.backbone is not None:
        return data.backbone.network(freeze=model.freeze)
    return PreActResNet18(model.width, stem_stride=model.stem_stride, norm=model.norm)


def build_optimizer(run: Run, base: Optimizer, context: RunContext) -> Optimizer:
    """Build the method's optimizer around the base.

    Raises:
        ExperimentError: The method would silently ignore an option of fine-tuning.
    """
    try:
        optimizer = run.method.optimizer(base, context)
    except ValueError as error:
        if not run.recipe.model.freeze:
            raise
        raise ExperimentError(
            f"{run.name} perturbs weights that --freeze keeps fixed ({error}): leave --freeze or this method out"
        ) from error
    head_lr = run.recipe.training.head_lr
    if head_lr is not None and all(group["lr"] != head_lr for group in optimizer.param_groups):
        raise ExperimentError(
            f"{run.name} has one learning rate of its own, and head_lr={head_lr} would be ignored: leave --head-lr or "
            "this method out"
        )
    return optimizer


class Forward:
    """The network and its loss for one step; every sample that it evaluates is counted.

    A sample is one gradient evaluation where autograd records, and `FORWARD_ONLY` of one under `torch.no_grad()`.

    Processes average their gradients, and their shares of a batch may differ by one image. So each mean loss is
    weighted by this process's share of the whole batch; the samples that a step function selects from its share
    represent all of it.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, world: World, autocast: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._model, self._batch, self._world, self._autocast = model, batch, world, autocast
        self._recorded = self._unrecorded = 0

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Evaluate the mean cross-entropy."""
        images, labels = tensors
        logits = self.logits(images)
        return F.cross_entropy(logits.float(), labels, reduction="sum") * self._weight(len(labels))

    def losses(self, *tensors: Tensor) -> Tensor:
        """Evaluate the cross-entropy of each sample, (n,), weighted so that their mean is the mean cross-entropy."""
        images, labels = tensors
        return F.cross_entropy(self.logits(images).float(), labels, reduction="none") * self._share

    def mean(self, losses: Tensor) -> Tensor:
        """Average losses (n,) that a step function has computed from `logits`."""
        return losses.sum() * self._weight(len(losses))

    def logits(self, images: Tensor) -> Tensor:
        """Evaluate the logits of images."""
        self.count(len(images), recorded=torch.is_grad_enabled())
        with self._autocast():
            logits: Tensor = self._model(images)
        return logits

    def count(self, images: int, *, recorded: bool) -> None:
        """Count images that another network of the same size evaluates, such as a running mean."""
        if recorded:
            self._recorded += images
        else:
            self._unrecorded += images

    def cost(self) -> Fraction:
        """Return the gradient evaluations so far, of all processes together; every process must call it."""
        counts = self._recorded, self._unrecorded
        if self._world.size > 1:
            total = self._world.total(torch.tensor(counts, dtype=torch.int64, device=self._world.device))
            counts = tuple(total.tolist())
        return counts[0] + FORWARD_ONLY * counts[1]

    @property
    def _share(self) -> float:
        return len(self._batch) * self._world.size / self._batch.size

    def _weight(self, n: int) -> float:
        return (self._world.size / self._batch.size) * (len(self._batch) / n)
