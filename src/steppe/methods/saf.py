"""SAF: sharpness-aware training by a term in the loss, with a memory of past outputs."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._checks import check_count
from steppe._engine.callers import warn
from steppe._engine.eager import eager
from steppe.methods._card import Comparison, MethodCard, plain_base
from steppe.methods._step_function import CountedForward, LabeledBatch
from steppe.methods._trajectory import (
    StepWithTerm,
    broadcastable,
    check_epoch,
    check_hyperparameters,
    kl_divergence,
    zero_term,
)
from steppe.papers import NEURIPS, Paper

SAF_PAPER = Paper(
    "du2022saf",
    ("Jiawei Du", "Daquan Zhou", "Jiashi Feng", "Vincent Y. F. Tan", "Joey Tianyi Zhou"),
    "Sharpness-Aware Training for Free",
    "2205.14083",
    2022,
    NEURIPS,
)


class SAF(nn.Module):
    """SAF's trajectory loss: keep the outputs near those of the same samples E epochs ago.

    L_traj(w_e) = lambda tau^2 / |B| sum_{i in B} KL(softmax(y_i^(e-E) / tau) || softmax(f(w_e, x_i) / tau)), added to
    the loss from epoch E_start on, with y_i^(e-E) the logits of sample i in epoch e - E. One pass per step, with any
    optimizer. A sample without logits from E epochs ago has no term, and still counts in |B|.

    The module stores the logits: (E + 1) * samples * classes numbers on its device (CIFAR-10 with the defaults: 8 MB;
    ImageNet in float16: 10 GB), all of them in ``state_dict()``. Move it to the device of the logits, and keep it
    outside of the model, whose wrappers would copy it at every step.

    Call it in every epoch from the first on. In an epoch the first finite logits of a sample are stored, so that the
    second pass of SAM has its term and stores no output of w + e. In eval mode nothing is stored.

    The printed equation has no tau^2; the official code multiplies by it, and its lambda includes this. For the
    equation as printed give lambda / tau^2. Further differences from the official code, which vanish on one process
    with each sample once per epoch: it starts one epoch after its E_start; where a sample has no record, it uses
    uniform or older outputs, and so it does for most samples on several processes; its memory is on the host, and is
    not part of its checkpoints.

    Args:
        samples: The number of samples in the data set.
        classes: The shape of the logits of one sample, with the classes first: 10, or (21, 64, 64). Further
            dimensions are positions, averaged over as in :func:`torch.nn.functional.cross_entropy`.
        lmbda: lambda, the weight of the term; the official code's recipe has 0.3.
        tau: tau, the temperature; usually 5, which the authors seldom tune.
        epochs_ago: E, the age of the outputs in epochs; usually 2 or 3.
        start: E_start, the first epoch with the term, counted from 0; usually 5, or 30 % of all epochs.
        dtype: The dtype of the stored logits. float16 halves the memory; the divergence is computed in float32 or
            wider.
        group: The processes that share the data set, by default all of ``torch.distributed``, if it is initialized.
            Each process gets other samples in every epoch, so each stores the logits of all processes, and their
            batches must be of equal size, which ``DistributedSampler`` ensures.

    Note:
        In a step of :class:`steppe.SAM`, give SAM both modules, ``model=[model, saf]``: the memory then keeps the
        outputs at w, and SAM does not warn of buffers that both passes change outside of ``model=``.

    Raises:
        ValueError: A hyperparameter is out of range; (when called) logits or indices have a wrong shape, or the
            epochs are not consecutive.
        IndexError: (when called) An index is outside the data set. For indices on an accelerator, the device raises
            an assertion later, because nothing here waits for it.
        RuntimeError: (when called) The memory is on another device.

    Example:
        >>> saf = SAF(samples=4, classes=3, epochs_ago=1, start=0)
        >>> x, indices = torch.randn(2, 3), torch.tensor([0, 2])
        >>> saf(x, indices, epoch=0), saf(x, indices, epoch=1)
        (tensor(0.), tensor(0.))
        >>> bool(saf(-x, indices, epoch=2) > 0)
        True

    References:
        Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """

    paper: ClassVar[Paper] = SAF_PAPER

    outputs: Tensor
    """The stored logits, of shape ``(E + 1, samples, *classes)``; those of epoch e are in row e mod (E + 1)."""
    epochs: Tensor
    """The epoch of each stored output, of shape (E + 1, samples); -1 where there is none."""

    def __init__(
        self,
        samples: int,
        classes: int | Sequence[int],
        *,
        lmbda: float = 0.3,
        tau: float = 5.0,
        epochs_ago: int = 3,
        start: int = 5,
        dtype: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        shape = (classes,) if isinstance(classes, int) else tuple(classes)
        if samples < 1 or not shape or min(shape) < 1:
            raise ValueError(
                f"samples={samples} and classes={classes}: the memory holds the logits of every sample, so give the "
                "data set's length, and the number of classes or the whole shape of one sample's logits"
            )
        check_count("epochs_ago", epochs_ago, "E, the age of the outputs in epochs")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype, got {dtype}: it is that of the stored logits")
        check_hyperparameters(lmbda, tau, start)
        self.samples, self.shape = samples, shape
        self.lmbda, self.tau, self.epochs_ago, self.start, self.group = lmbda, tau, epochs_ago, start, group
        self.epoch: int | None = None
        """The epoch of the last call; None before the first."""
        self._samples_in_epoch, self._warned_few_samples = 0, False
        # One row more than E: the logits of an epoch must not replace those that it is compared with.
        self.register_buffer("outputs", torch.zeros(epochs_ago + 1, samples, *shape, dtype=dtype))
        self.register_buffer("epochs", torch.full((epochs_ago + 1, samples), -1, dtype=torch.int32))

    @eager
    def forward(self, logits: Tensor, indices: Tensor, *, epoch: int, record: bool = True) -> Tensor:
        """Return the term for a batch, and store its logits.

        Args:
            logits: f(w, x), of shape ``(n, *classes)``.
            indices: The positions of the samples in the data set, integers of shape (n,). On the CPU, as a loader
                yields them, checking them costs nothing.
            epoch: The number of the epoch, counted from 0.
            record: True to store the logits. A pass at w + e must not store samples that were not in the step's pass
                at w: give ``record=not optimizer.current_pass.is_perturbed`` with :func:`steppe.closures.fraction`.

        Returns:
            A 0-dim tensor, float32 or wider; zero without a graph while there is no term yet.
        """
        self._check_batch(logits, indices)
        check_epoch(epoch)
        if record and self.training:
            self._advance(epoch)
        indices = indices.to(logits.device, torch.long, non_blocking=True)
        term = zero_term(logits)
        if epoch >= max(self.start, self.epochs_ago):
            outputs, epochs = self._rows(epoch - self.epochs_ago)
            known = epochs.index_select(0, indices) == epoch - self.epochs_ago
            divergence = kl_divergence(outputs.index_select(0, indices), logits, self.tau)
            term = self.lmbda * self.tau**2 * torch.where(broadcastable(known, divergence), divergence, 0.0).mean()
        if record and self.training:
            self._record(*self._gathered(logits.detach().to(self.outputs.dtype), indices), epoch)
        return term

    @torch.no_grad()
    def _record(self, logits: Tensor, indices: Tensor, epoch: int) -> None:
        self._samples_in_epoch += len(indices)
        outputs, epochs = self._rows(epoch)
        old, of_epoch = outputs.index_select(0, indices), epochs.index_select(0, indices)
        new = (of_epoch != epoch) & logits.isfinite().flatten(1).all(1)
        outputs.index_copy_(0, indices, torch.where(broadcastable(new, logits), logits, old))
        epochs.index_copy_(0, indices, torch.where(new, epoch, of_epoch))

    def _rows(self, epoch: int) -> tuple[Tensor, Tensor]:
        row = epoch % len(self.outputs)
        return self.outputs.select(0, row), self.epochs.select(0, row)

    def _gathered(self, logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and indices of all processes."""
        if not dist.is_available() or not dist.is_initialized() or (world := dist.get_world_size(self.group)) < 2:
            return logits, indices
        parts = []
        for local in (logits.contiguous(), indices.contiguous()):
            parts.append([torch.empty_like(local) for _ in range(world)])
            dist.all_gather(parts[-1], local, group=self.group)
        return torch.cat(parts[0]), torch.cat(parts[1])

    def _check_batch(self, logits: Tensor, indices: Tensor) -> None:
        if logits.shape[1:] != self.shape or not logits.is_floating_point():
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} and {logits.dtype} do not fit a memory of (n, "
                f"{', '.join(map(str, self.shape))}): give the model's raw outputs, and their shape as classes="
            )
        if indices.shape != logits.shape[:1] or indices.dtype.is_floating_point or indices.dtype == torch.bool:
            raise ValueError(
                f"indices of shape {tuple(indices.shape)} and {indices.dtype} for {len(logits)} samples: each sample "
                "is compared with its own past outputs, so give one integer each, its position in the data set"
            )
        if logits.device != self.outputs.device:
            raise RuntimeError(
                f"the logits are on {logits.device}, and the memory on {self.outputs.device}: every step would wait "
                "for the transfer. Move it once, before the training, with saf.to(device)"
            )
        inside = (indices >= 0).logical_and(indices < self.samples).all()
        if indices.is_cuda:
            torch._assert_async(inside, f"SAF: an index is not from 0 to {self.samples - 1}")
        elif not inside:
            raise IndexError(
                f"indices from {int(indices.min())} to {int(indices.max())} in a data set of {self.samples} samples: "
                "a sample would be compared with another one's past. Give its place in the data set, not in the batch"
            )

    def _advance(self, epoch: int) -> None:
        if self.epoch is None and epoch > max(1, self.start - self.epochs_ago):
            warn(
                f"SAF starts in epoch {epoch} without stored outputs, so there is no term before epoch "
                f"{epoch + self.epochs_ago}. Load its state_dict when you resume, and call it from the first epoch on"
            )
        elif self.epoch is not None and not 0 <= epoch - self.epoch <= 1:
            raise ValueError(
                f"epoch went from {self.epoch} to {epoch}: the stored outputs belong to another training, or those of "
                "the epochs between are missing. Call SAF in every epoch; load the checkpoint's state_dict when you "
                "resume, and make a new SAF for a new training"
            )
        elif (
            self.epoch is not None
            and epoch > self.epoch
            and 2 * self._samples_in_epoch < self.samples
            and not self._warned_few_samples
        ):
            self._warned_few_samples = True
            warn(
                f"SAF got {self._samples_in_epoch} of {self.samples} samples in epoch {self.epoch}, and only these can "
                f"have a term {self.epochs_ago} epochs later. Count epochs over the whole data set, not steps"
            )
        if epoch != self.epoch:
            self._samples_in_epoch = 0
        self.epoch = epoch

    def get_extra_state(self) -> Tensor:
        """Return the epoch and its number of samples, as a tensor: checkpoints hold tensors only."""
        return torch.tensor([-1 if self.epoch is None else self.epoch, self._samples_in_epoch])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        epoch, self._samples_in_epoch = (int(number) for number in state)
        self.epoch = None if epoch < 0 else epoch

    def extra_repr(self) -> str:
        """Return the hyperparameters and the size of the memory, for ``repr``."""
        return (
            f"samples={self.samples}, classes={self.shape}, lmbda={self.lmbda}, tau={self.tau}, "
            f"epochs_ago={self.epochs_ago}, start={self.start}, {self.outputs.nbytes / 1e6:.1f} MB"
        )


def saf(samples: int, classes: int | Sequence[int], **kwargs: Any) -> SAF:
    """SAF: a term in the loss that keeps the outputs near those of E epochs ago. One pass per step, no perturbation.

    The term is lambda tau^2 / |B| sum_{i in B} KL(softmax(y_i / tau) || softmax(f(w, x_i) / tau)), where y_i are the
    logits of sample i, E epochs ago.

    This is not an optimizer, but a module whose result the closure adds to the loss.

    Args:
        samples: The number of samples in the data set.
        classes: The number of classes, or the shape of the logits of one sample.
        **kwargs: lmbda, tau, epochs_ago, start and the other arguments of :class:`steppe.SAF`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> saf(samples=60_000, classes=10).epochs_ago
        3

    References:
        Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """
    return SAF(samples, classes, **kwargs)


class SAFStep(StepWithTerm):
    """Takes the steps of SAF in a comparison: adds the divergence from each sample's earlier outputs to the loss."""

    remembers_samples: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: Optimizer,
        samples: int,
        classes: int,
        lmbda: float = 0.3,
        tau: float = 5.0,
        epochs_ago: int = 3,
        start: int = 5,
    ) -> None:
        module = saf(samples, classes, lmbda=lmbda, tau=tau, epochs_ago=epochs_ago, start=start)
        super().__init__(optimizer, module)

    def term(self, forward: CountedForward, logits: Tensor, batch: LabeledBatch) -> Tensor:
        """Return the divergence from the stored outputs."""
        value: Tensor = self.module(logits, batch.indices, epoch=batch.epoch)
        return value


def _base_and_term(base: Optimizer, model: nn.Module, **arguments: Any) -> tuple[Any, ...]:
    return base, saf(**arguments)


CARD = MethodCard(
    name="saf",
    function=saf,
    label="SAF",
    paper=SAF_PAPER,
    summary="Add a term to the loss that keeps the outputs near those of E epochs ago. There is no perturbation and no "
    "second pass.",
    equation="L + lambda tau^2 / |B| sum_{i in B} KL(softmax(y_i / tau) || softmax(f(w, x_i) / tau))\n"
    "y_i = the logits of sample i, E epochs ago",
    cost="1",
    passes=1,
    memory="(E + 1) samples * classes numbers, nothing of the weights' size: CIFAR-10, 8 MB; ImageNet in float16, "
    "10 GB",
    when="For classification over many epochs, if only one pass is affordable; with any base.",
    when_not="With samples that have no index, a single epoch, or very many classes.",
    usual={
        "lmbda": "0.3, the default of the official code; 0.16 in its script",
        "tau": "5",
        "epochs_ago": "2 or 3",
        "start": "5, or 30 % of all epochs",
    },
    verified="official code, read",
    checked="https://github.com/AngusDujw/SAF multiplies by tau^2, as we do; the printed equation does not. It starts "
    "an epoch later, takes uniform or older outputs where a sample has no record, and does not save its memory. Of "
    "the paper, abstract and introduction were read.",
    caveats=(
        "It needs each sample's position in the data set, and a call in every epoch from the first on.",
        "Its state_dict belongs in your checkpoint.",
    ),
    required={"samples": 60_000, "classes": 10},
    short_run={"start": 1, "epochs_ago": 1},
    build_example=_base_and_term,
    arguments_of=(SAF,),
    usage_code="saf = steppe.variants.saf(samples=60_000, classes=10)\n"
    "loss = F.cross_entropy(logits, y) + saf(logits, indices, epoch=epoch)",
    other_measurements=(
        "[Cosine schedule and momentum](../evidence/price.md), 20 seeds, lmbda 0.6: 0.7 points better than SGD and "
        "than averaged weights, 1.5 under Gaussian noise, 2.0 under corruptions, calibration error 4.2 smaller, for "
        "one pass a step; SAM has 0.6, 1.5, no difference beyond chance, and 6.1 for two. With the usual lmbda, 0.3, "
        "0.5 better ([ten seeds](../evidence/family.md)). On 12,000 images: 0.2 better, 2.2 under noise; "
        "SAM is 0.8 worse there, and 1.2 better under noise.",
        "[The same with 40 % wrong labels](../evidence/price.md), 20 seeds, lmbda 9.6: 25.4 points better than SGD, "
        "29.5 under Gaussian noise, for one pass a step, where SAM is 25.1 and 29.2 better for two; worse calibrated "
        "by 15 (SAM 12). With the usual lmbda, 0.3, 3.6 better ([ten seeds](../evidence/family.md)). "
        "On 12,000 images: 9.8 better, where SAM is 8.1 better.",
    ),
    comparison=Comparison(
        summary="no perturbation: keeps the outputs near those of some epochs ago",
        build=plain_base,
        step_function=SAFStep,
    ),
)
