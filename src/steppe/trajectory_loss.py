"""Flat minima by a term of the loss: SAF compares outputs with those of E epochs ago, MESA with averaged weights'."""

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from steppe import papers
from steppe._engine.callers import warn
from steppe._tensors.dtensor import foreach
from steppe._tensors.ops import as_real, copy_

_F = TypeVar("_F", bound=Callable[..., Any])
# What is counted on the host would be lost, or compiled anew at every epoch.
_eager: Callable[[_F], _F] = torch.compiler.disable


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

    paper: ClassVar[papers.Paper] = papers.SAF

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
        _check(lmbda, tau, start)
        self.samples, self.shape = samples, shape
        self.lmbda, self.tau, self.epochs_ago, self.start, self.group = lmbda, tau, epochs_ago, start, group
        self.epoch: int | None = None
        """The epoch of the last call; None before the first."""
        self._seen, self._said_few = 0, False
        # One row more than E: an epoch's own logits must not replace those that it still compares with.
        self.register_buffer("outputs", torch.zeros(epochs_ago + 1, samples, *shape, dtype=dtype))
        self.register_buffer("epochs", torch.full((epochs_ago + 1, samples), -1, dtype=torch.int32))

    @_eager
    def forward(self, logits: Tensor, indices: Tensor, *, epoch: int, record: bool = True) -> Tensor:
        """Return the term for a batch, and remember its logits.

        Args:
            logits: f(w, x), of shape (n, *classes).
            indices: which samples of the data set they belong to, integers of shape (n,). On the CPU, as a loader
                yields them, they are checked for free.
            epoch: the number of the epoch, counted from 0.
            record: whether to remember the logits. Not in a pass at w + e that shows samples which the step's pass at
                w did not: give ``record=not optimizer.walk.climbs`` with :func:`steppe.closures.fraction`.

        Returns:
            A 0-dim tensor, float32 or wider; zero without a graph where the term is not there yet.
        """
        self._check_batch(logits, indices)
        _check_epoch(epoch)
        if record and self.training:
            self._advance(epoch)
        indices = indices.to(logits.device, torch.long, non_blocking=True)
        term = _zero(logits)
        if epoch >= max(self.start, self.epochs_ago):
            outputs, epochs = self._rows(epoch - self.epochs_ago)
            known = epochs.index_select(0, indices) == epoch - self.epochs_ago
            divergence = _divergence(outputs.index_select(0, indices), logits, self.tau)
            term = self.lmbda * self.tau**2 * torch.where(_beside(divergence, known), divergence, 0.0).mean()
        if record and self.training:
            self._record(*self._of_all(logits.detach().to(self.outputs.dtype), indices), epoch)
        return term

    @torch.no_grad()
    def _record(self, logits: Tensor, indices: Tensor, epoch: int) -> None:
        self._seen += len(indices)
        outputs, epochs = self._rows(epoch)
        old, of_epoch = outputs.index_select(0, indices), epochs.index_select(0, indices)
        new = (of_epoch != epoch) & logits.isfinite().flatten(1).all(1)
        outputs.index_copy_(0, indices, torch.where(_beside(logits, new), logits, old))
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


class MESA(nn.Module):
    """MESA: SAF's trajectory loss with the outputs of averaged weights in place of remembered ones.

    v_t = beta v_{t-1} + (1 - beta) w_t after every step, and from epoch E_start on
    L_traj(w) = lambda tau^2 / |B| sum_{i in B} KL(softmax(f(v, x_i) / tau) || softmax(f(w, x_i) / tau)).
    A further forward a step, without gradients: 4/3 passes. The memory is one copy of weights and buffers.

    The copy is :attr:`ema`, always in eval mode: the statistics of its BatchNorm layers are averages of the model's,
    its dropout is off, and its forward touches neither the model's buffers nor torch's generators.

    Args:
        model: the model to be trained, not in half precision (1 - beta would round to nothing), on its device. Of a
            ``DistributedDataParallel`` or compiled model, the module inside is taken.
        optimizer: updates the average after each of its steps, also a :class:`steppe.SAM`, once a step and at w.
            Without it, call :meth:`update` after every step.
        lmbda: lambda, the weight of the term; the official code's recipe for ImageNet has 0.8, its default is 0.3.
        tau: tau, the temperature; 5, which the authors seldom tune.
        beta: beta, the average's memory of about 1 / (1 - beta) steps; 0.9998 is the official code's, for ImageNet. The
            initial weights keep the share beta^t, so a shorter training needs less, such as 0.9995 or 0.999.
        start: E_start, the first epoch with the term, counted from 0: 5, or 30 % of all epochs.

    Raises:
        ValueError: a hyperparameter that makes no sense, a model that cannot be averaged, an optimizer of another one;
            outputs of another shape (when called).
        RuntimeError: (when called) an epoch went by without a single update; the model has changed, or moved to
            another device.

    Differences from the official code: tau^2 and the first epoch as for :class:`SAF`; before E_start the forward of the
    average is not made; buffers that are not floating are copied, not averaged and truncated.

    >>> model = torch.nn.Linear(2, 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> mesa = MESA(model, optimizer, start=0, beta=0.5)
    >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
    >>> for epoch in range(2):
    ...     logits = model(x)
    ...     term = mesa(logits, x, epoch=epoch)
    ...     (torch.nn.functional.cross_entropy(logits, y) + term).backward()
    ...     optimizer.step()
    >>> bool(term > 0)
    True

    Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """

    paper: ClassVar[papers.Paper] = papers.SAF

    ema: nn.Module
    """The model with the averaged weights v, in eval mode; often the better one to evaluate."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        lmbda: float = 0.8,
        tau: float = 5.0,
        beta: float = 0.9998,
        start: int = 5,
    ) -> None:
        super().__init__()
        _check(lmbda, tau, start)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be at least 0 and less than 1, got {beta}: with 1 the average never moves")
        model = _bare(model)
        _check_model(model)
        self.lmbda, self.tau, self.beta, self.start = lmbda, tau, beta, start
        self.updates = 0
        """How many steps were averaged."""
        self._epoch: int | None = None
        self._updates_before, self._said_young = 0, False
        self._model = (model,)  # in a tuple: it is no submodule of ours
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.ema.zero_grad(set_to_none=True)
        self._automatic = optimizer is not None
        if optimizer is not None:
            self._follow(optimizer)

    @_eager
    def forward(self, logits: Tensor, *inputs: Any, epoch: int, **kwargs: Any) -> Tensor:
        """Return the term for a batch.

        Args:
            logits: f(w, x), of shape (n, classes, ...), as the model has returned them.
            inputs: what the model was called with; ``kwargs`` as well.
            epoch: the number of the epoch, counted from 0.

        Returns:
            A 0-dim tensor, float32 or wider; zero without a graph before E_start.
        """
        _check_epoch(epoch)
        if self.training:
            self._watch(epoch)
        if epoch < self.start:
            return _zero(logits)
        if self.start > 0 and not self._said_young and (share := self.beta**self.updates) > 0.5:
            self._said_young = True
            warn(
                f"after {self.updates} steps, {share:.0%} of MESA's average is still the initial weights, because beta "
                f"= {self.beta}: the outputs are drawn to those. Take a smaller beta, or a later start"
            )
        accelerators = [logits.device] if logits.device.type not in ("cpu", "meta", "mps") else []
        kind = accelerators[0].type if accelerators else "cuda"
        with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=kind):
            average = self.ema(*inputs, **kwargs)
        if not isinstance(average, Tensor) or average.shape != logits.shape or average.dim() < 2:
            found = tuple(average.shape) if isinstance(average, Tensor) else type(average).__name__
            raise ValueError(
                f"the model with the averaged weights returned {found}, and the logits have shape "
                f"{tuple(logits.shape)}: the term compares the two, class by class. Give the inputs that the logits "
                "were made from, and a model that returns a tensor of shape (n, classes, ...)"
            )
        return self.lmbda * self.tau**2 * _divergence(average, logits, self.tau).mean()

    def update(self) -> None:
        """Average the weights, v = beta v + (1 - beta) w; to be called after every step, at w.

        Raises:
            RuntimeError: the optimizer does it already; the model has changed, or moved to another device.
        """
        if self._automatic:
            raise RuntimeError(
                "update() was called, and the optimizer calls it after each of its steps: the average would move twice "
                "a step. Leave this call out, or do not give MESA the optimizer"
            )
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        model = self._model[0]
        averages, weights = [*self.ema.parameters(), *self.ema.buffers()], [*model.parameters(), *model.buffers()]
        if [_kind(t) for t in averages] != [_kind(t) for t in weights]:
            raise RuntimeError(
                "the model's weights differ from MESA's average in number, shape, dtype or device: they were changed "
                "or moved after MESA was made. Move both with .to(...), and make MESA when the model is complete"
            )
        moving = [t.is_floating_point() or t.is_complex() for t in averages]
        pairs = list(zip(averages, weights, moving, strict=True))
        if any(moving):
            foreach(
                torch._foreach_lerp_,
                [as_real(v) for v, _, moves in pairs if moves],
                [as_real(w.detach()) for _, w, moves in pairs if moves],
                weight=1 - self.beta,
            )
        if not all(moving):
            copy_([v for v, _, moves in pairs if not moves], [w for _, w, moves in pairs if not moves])
        self.updates += 1

    def _follow(self, optimizer: Optimizer) -> None:
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        if owned.isdisjoint(self._model[0].parameters()):
            raise ValueError(
                "the optimizer holds none of the model's parameters, so its steps are not the model's, and the average "
                "would be taken at the wrong times: give the optimizer that trains this model"
            )
        me = weakref.ref(self)  # a MESA that is given up is not to be updated for ever

        def after_step(*_: Any) -> None:
            if (mesa := me()) is not None:
                mesa._average()

        optimizer.register_step_post_hook(after_step)

    def _watch(self, epoch: int) -> None:
        """Notice a forgotten update()."""
        if self._epoch is not None and epoch > self._epoch and self.updates == self._updates_before:
            raise RuntimeError(
                f"the average was not updated once in epoch {self._epoch}: the outputs would be drawn to weights that "
                "never move. Call update() after every step, or give MESA the optimizer, which then does"
            )
        if epoch != self._epoch:
            self._epoch, self._updates_before = epoch, self.updates

    def train(self, mode: bool = True) -> "MESA":
        """Set the mode of this module; :attr:`ema` stays in eval mode."""
        super().train(mode)
        self.ema.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Return what a checkpoint needs beside the average itself; a tensor, as all that is stored."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        self.updates, self._epoch = int(state), None

    def extra_repr(self) -> str:
        """Say the hyperparameters."""
        return f"lmbda={self.lmbda}, tau={self.tau}, beta={self.beta}, start={self.start}"


def _divergence(past: Tensor, now: Tensor, tau: float) -> Tensor:
    """KL(softmax(past / tau) || softmax(now / tau)) over dimension 1, in float32 or wider."""
    wide = torch.promote_types(now.dtype, torch.float32)
    p, q = (F.log_softmax(y.to(wide) / tau, dim=1) for y in (past, now))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def _beside(like: Tensor, flags: Tensor) -> Tensor:
    """One flag a sample, in a shape that goes with (n, ...)."""
    return flags.reshape(-1, *[1] * (like.dim() - 1))


def _zero(logits: Tensor) -> Tensor:
    return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _bare(model: nn.Module) -> nn.Module:
    """The module inside its wrappers."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


def _check(lmbda: float, tau: float, start: int) -> None:
    if not 0 <= lmbda < math.inf:
        raise ValueError(f"lmbda must be finite and at least 0, got {lmbda}: it is the weight of the term")
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be finite and more than 0, got {tau}: the logits are divided by it")
    if start < 0:
        raise ValueError(f"start must be 0 or more, got {start}: it is the first epoch with the term")


def _check_epoch(epoch: int) -> None:
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise ValueError(
            f"epoch must be an integer of 0 or more, got {epoch!r}: it says how old the outputs are. Give the epoch's "
            "number as Python's int, which needs no look at the device"
        )


def _check_model(model: nn.Module) -> None:
    parameters = list(model.parameters())
    if any(is_lazy(p) for p in parameters):
        raise ValueError(
            "the model has parameters without a shape yet, so there is nothing to average: run one forward before "
            "MESA is made"
        )
    if any(p.dtype.itemsize <= 2 for p in parameters):
        raise ValueError(
            "the model has parameters in half precision, where the small moves of an average are rounded away: keep "
            "them in float32, and run the forward under torch.autocast"
        )
