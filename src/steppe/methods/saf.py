"""SAF: sharpness-aware training by a term of the loss, with a memory of past outputs."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._engine.callers import warn
from steppe.methods._card import Comparison, MethodCard, plain_base
from steppe.methods._step_function import Batch, Forward
from steppe.methods._trajectory import WithTerm, beside, check, check_epoch, eager, kl_divergence, zero
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
    """SAF's trajectory loss: stay near the outputs that the same samples had E epochs ago.

    L_traj(w_e) = lambda tau^2 / |B| sum_{i in B} KL(softmax(y_i^(e-E) / tau) || softmax(f(w_e, x_i) / tau)), added to
    the loss from epoch E_start on, with y_i^(e-E) the logits of sample i in epoch e - E. One pass a step, whatever the
    optimizer. A sample that was not seen E epochs ago has no term, and still counts in |B|.

    The module is the memory of the logits: (E + 1) * samples * classes numbers on its device (CIFAR-10 with the
    defaults: 8 MB; ImageNet in float16: 10 GB), all of it in ``state_dict()``. Move it to the device of the logits, and
    keep it outside of the model, whose wrappers would copy it at every step.

    Args:
        samples: how many samples the data set has.
        classes: the shape of the logits of one sample, with the classes first: 10, or (21, 64, 64). Further
            dimensions are positions, averaged over as in :func:`torch.nn.functional.cross_entropy`.
        lmbda: lambda, the weight of the term; the official code's recipe has 0.3.
        tau: tau, the temperature; 5, which the authors seldom tune.
        epochs_ago: E; 2 or 3.
        start: E_start, the first epoch with the term, counted from 0: 5, or 30 % of all epochs.
        dtype: of the memory. float16 halves it; the divergence is computed in float32 at least.
        group: the processes that share the data set, by default all of ``torch.distributed``, if it runs. They see
            other samples in every epoch, so each remembers what all of them saw, and their batches must be of equal
            size, which ``DistributedSampler`` sees to.

    Call it in every epoch from the first on. In an epoch, the first finite logits of a sample are remembered, so that
    the second pass of SAM finds its term, and leaves no output of w + e behind. In eval mode nothing is remembered.

    Raises:
        ValueError: a hyperparameter that makes no sense; logits or indices of a wrong shape, epochs that do not follow
            one another (when called).
        IndexError: an index that is none of the data set's. Of indices on an accelerator it is the device that
            objects, later, because nothing here waits for it.
        RuntimeError: the memory is on another device.

    The printed equation has no tau^2; the official code multiplies by it, and its lambda is meant so. For the equation
    as printed give lambda / tau^2. Further differences from the official code, which are none on one process that
    sees each sample once an epoch: it starts one epoch after its E_start; where a sample has no record, it takes
    uniform or older outputs for one, and so it does for most samples on several processes; its memory is on the host,
    and is not part of its checkpoints.

    >>> saf = SAF(samples=4, classes=3, epochs_ago=1, start=0)
    >>> x, indices = torch.randn(2, 3), torch.tensor([0, 2])
    >>> saf(x, indices, epoch=0), saf(x, indices, epoch=1)
    (tensor(0.), tensor(0.))
    >>> bool(saf(-x, indices, epoch=2) > 0)
    True

    Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """

    paper: ClassVar[Paper] = SAF_PAPER

    outputs: Tensor
    """The logits, of shape (E + 1, samples, *classes); those of epoch e in row e mod (E + 1)."""
    epochs: Tensor
    """In which epoch each was remembered, of shape (E + 1, samples); -1 if never."""

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
        if epochs_ago < 1:
            raise ValueError(f"epochs_ago must be 1 or more, got {epochs_ago}: it is E, how far the term looks back")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype, got {dtype}: it is that of the remembered logits")
        check(lmbda, tau, start)
        self.samples, self.shape = samples, shape
        self.lmbda, self.tau, self.epochs_ago, self.start, self.group = lmbda, tau, epochs_ago, start, group
        self.epoch: int | None = None
        """The epoch of the last call; None before the first."""
        self._seen, self._said_few = 0, False
        # One row more than E: an epoch's own logits must not replace those that it still compares with.
        self.register_buffer("outputs", torch.zeros(epochs_ago + 1, samples, *shape, dtype=dtype))
        self.register_buffer("epochs", torch.full((epochs_ago + 1, samples), -1, dtype=torch.int32))

    @eager
    def forward(self, logits: Tensor, indices: Tensor, *, epoch: int, record: bool = True) -> Tensor:
        """Return the term for a batch, and remember its logits.

        Args:
            logits: f(w, x), of shape (n, *classes).
            indices: which samples of the data set they belong to, integers of shape (n,). On the CPU, as a loader
                yields them, they are checked for free.
            epoch: the number of the epoch, counted from 0.
            record: whether to remember the logits. Not in a pass at w + e that shows samples which the step's pass at
                w did not: give ``record=not optimizer.current_pass.is_perturbed`` with :func:`steppe.fraction`.

        Returns:
            A 0-dim tensor, float32 or wider; zero without a graph where the term is not there yet.
        """
        self._check_batch(logits, indices)
        check_epoch(epoch)
        if record and self.training:
            self._advance(epoch)
        indices = indices.to(logits.device, torch.long, non_blocking=True)
        term = zero(logits)
        if epoch >= max(self.start, self.epochs_ago):
            outputs, epochs = self._rows(epoch - self.epochs_ago)
            known = epochs.index_select(0, indices) == epoch - self.epochs_ago
            divergence = kl_divergence(outputs.index_select(0, indices), logits, self.tau)
            term = self.lmbda * self.tau**2 * torch.where(beside(divergence, known), divergence, 0.0).mean()
        if record and self.training:
            self._record(*self._of_all(logits.detach().to(self.outputs.dtype), indices), epoch)
        return term

    @torch.no_grad()
    def _record(self, logits: Tensor, indices: Tensor, epoch: int) -> None:
        self._seen += len(indices)
        outputs, epochs = self._rows(epoch)
        old, of_epoch = outputs.index_select(0, indices), epochs.index_select(0, indices)
        new = (of_epoch != epoch) & logits.isfinite().flatten(1).all(1)
        outputs.index_copy_(0, indices, torch.where(beside(logits, new), logits, old))
        epochs.index_copy_(0, indices, torch.where(new, epoch, of_epoch))

    def _rows(self, epoch: int) -> tuple[Tensor, Tensor]:
        row = epoch % len(self.outputs)
        return self.outputs.select(0, row), self.epochs.select(0, row)

    def _of_all(self, logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """What all processes saw."""
        if not dist.is_available() or not dist.is_initialized() or (world := dist.get_world_size(self.group)) < 2:
            return logits, indices
        parts = []
        for mine in (logits.contiguous(), indices.contiguous()):
            parts.append([torch.empty_like(mine) for _ in range(world)])
            dist.all_gather(parts[-1], mine, group=self.group)
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
                "is compared with its own past, so give one integer each, its place in the data set"
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
                f"SAF begins in epoch {epoch} and remembers no outputs: there is no term before epoch "
                f"{epoch + self.epochs_ago}. Load its state_dict when you resume, and call it from the first epoch on"
            )
        elif self.epoch is not None and not 0 <= epoch - self.epoch <= 1:
            raise ValueError(
                f"epoch went from {self.epoch} to {epoch}: what is remembered belongs to another training, or the "
                "outputs of the epochs between are missing. Call SAF in every epoch; load the checkpoint's state_dict "
                "when you resume, and make a new SAF for a new training"
            )
        elif self.epoch is not None and epoch > self.epoch and 2 * self._seen < self.samples and not self._said_few:
            self._said_few = True
            warn(
                f"epoch {self.epoch} showed SAF {self._seen} of {self.samples} samples, and only those seen in both "
                f"epochs have a term {self.epochs_ago} epochs later. Count epochs over the whole data set, not steps"
            )
        if epoch != self.epoch:
            self._seen = 0
        self.epoch = epoch

    def get_extra_state(self) -> Tensor:
        """Return what a checkpoint needs beside the memory itself; a tensor, as all that is stored."""
        return torch.tensor([-1 if self.epoch is None else self.epoch, self._seen])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        epoch, self._seen = (int(number) for number in state)
        self.epoch = None if epoch < 0 else epoch

    def extra_repr(self) -> str:
        """Say the hyperparameters and the memory's size."""
        return (
            f"samples={self.samples}, classes={self.shape}, lmbda={self.lmbda}, tau={self.tau}, "
            f"epochs_ago={self.epochs_ago}, start={self.start}, {self.outputs.nbytes / 1e6:.1f} MB"
        )


def saf(samples: int, classes: int, **kwargs: Any) -> SAF:
    """SAF: a term of the loss that keeps the outputs near those of E epochs ago. One pass a step, no climb.

    Not an optimizer but what its closure adds to the loss; the arguments are those of :class:`steppe.SAF`.

    >>> saf(samples=60_000, classes=10).epochs_ago
    3

    Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """
    return SAF(samples, classes, **kwargs)


class OwnPast(WithTerm):
    """Stay near what each image's outputs were some epochs ago (SAF)."""

    def __init__(
        self,
        optimizer: Optimizer,
        images: int,
        classes: int,
        lmbda: float = 0.3,
        tau: float = 5.0,
        epochs_ago: int = 3,
        start: int = 5,
    ) -> None:
        module = saf(images, classes, lmbda=lmbda, tau=tau, epochs_ago=epochs_ago, start=start)
        super().__init__(optimizer, module)

    def term(self, forward: Forward, logits: Tensor, batch: Batch) -> Tensor:
        """Compare with the memory."""
        value: Tensor = self.module(logits, batch.indices, epoch=batch.epoch)
        return value


def _made(base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
    return (base, saf(**given))


CARD = MethodCard(
    name="saf",
    function=saf,
    label="SAF",
    about="There is no climb, and no second pass.",
    equation="L + lambda tau^2 / |B| sum_{i in B} KL(softmax(y_i / tau) || softmax(f(w, x_i) / tau))\n"
    "y_i = the logits of sample i, E epochs ago",
    cost="1",
    passes=1,
    memory="(E + 1) samples * classes numbers, nothing of the weights' size: CIFAR-10, 8 MB; ImageNet in float16, "
    "10 GB",
    when="For classification over many epochs, where one pass must do, with any base.",
    when_not="With samples that have no index, a single epoch, or very many classes.",
    usual={
        "lmbda": "0.3 (official code)",
        "tau": "5",
        "epochs_ago": "2 or 3",
        "start": "5, or 30 % of all epochs",
    },
    checked="The official code, https://github.com/AngusDujw/SAF, was read. It multiplies by tau^2, which the "
    "printed equation does not, and so do we. It starts an epoch later, takes uniform or older outputs where a "
    "sample has no record, and does not save its memory. Of the paper, abstract and introduction were read.",
    caveats=(
        "It needs each sample's place in the data set, and to be called in every epoch from the first on.",
        "Its state_dict belongs into your checkpoint.",
    ),
    required={"samples": 60_000, "classes": 10},
    make=_made,
    arguments_of=(SAF,),
    use="saf = steppe.variants.saf(samples=60_000, classes=10)\n"
    "loss = F.cross_entropy(logits, y) + saf(logits, indices, epoch=epoch)",
    comparison=Comparison(
        summary="no climb: stays near the outputs of some epochs ago", build=plain_base, step_function=OwnPast
    ),
)
