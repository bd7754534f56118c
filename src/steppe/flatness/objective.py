"""The loss of a model over data as a function of its weights: what every measure of flatness is a measure of."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import count
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from steppe._tensors.ops import accumulator
from steppe.flatness.batches import Batches, Fingerprint, cast
from steppe.flatness.evaluation import Evaluate, Evaluation, Loss, chosen, evaluation, modes
from steppe.flatness.kernels import check_twice, twice_differentiable

Progress: TypeAlias = Callable[[str, int], None]
"""(what is being measured, passes over the data so far); what it raises ends the measurement."""


class Objective:
    """The mean loss over data, L(w) = 1/N sum_i l(w; x_i, y_i), as a function of the weights alone.

    The weights are one vector of ``n`` entries: all parameters with ``requires_grad``, in the order of
    ``named_parameters()``. Nothing of the model is changed: weights, buffers, ``.grad``, modes and generators are what
    they were. Batches of different sizes count by their samples, and one batch is in memory at a time.

    **BatchNorm.** By default every module is in evaluation mode, so that BatchNorm normalizes with its running
    statistics: this is the function that is used later, a sample's loss is its own, and nothing depends on how the
    data are cut into batches. ``batch_norm="train"`` normalizes with the statistics of each batch, as in training: it
    is another function with another Hessian, and depends on ``batch_size``. Dropout is off either way.

    Args:
        model: any module. One in ``DistributedDataParallel`` is measured over the data of all ranks: each gives its
            share, all ask for the same things, and all get the same numbers.
        data: a pair of tensors (inputs, targets), to be cut into batches here; or batches that can be walked through
            again and again, the same ones each time (a list, a ``DataLoader``).
        loss: (outputs, targets) -> mean loss; a batch is then (*inputs, targets).
        evaluate: in its place, (model, batch) -> mean loss, for batches of any form.
        batch_size: samples in a batch, where ``data`` is a pair of tensors.
        batch_norm: "eval" or "train".
        parameters: the names of the parameters that are w; by default all that require a gradient.
        size: batch -> over how many samples its loss is a mean; by default the length of its first tensor. A mean over
            tokens that are not padding needs it.
        dtype: what to compute in; by default that of the weights, float32 where they are in half precision.
        seed: of whatever the model draws at random: every pass draws the same.
        progress: told after every pass over the data.

    Raises:
        TypeError: sharded or complex parameters.
        ValueError: no parameters, a name that is none, neither or both of ``loss`` and ``evaluate``.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
    >>> objective.loss()
    tensor(2.5000, dtype=torch.float64)
    >>> objective.loss(torch.tensor([0.0, -1.0]))
    tensor(0.5000, dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: Loss | None = None,
        evaluate: Evaluate | None = None,
        batch_size: int = 256,
        batch_norm: Literal["eval", "train"] = "eval",
        parameters: Sequence[str] | None = None,
        size: Callable[[Any], int] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        if batch_norm not in ("eval", "train"):
            raise ValueError(f"batch_norm={batch_norm!r}: choose 'eval' (running statistics) or 'train' (the batch's)")
        self.group = model.process_group if isinstance(model, DistributedDataParallel) else None
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.batch_norm, self.seed = batch_norm, seed
        self.stage = ""
        """What is being measured, for ``progress``."""
        self.passes = 0
        """Passes over the data so far."""
        self._progress = progress
        self._evaluation = Evaluation(self.model, evaluation(loss, evaluate))
        self._batches = Batches(data, batch_size, size)
        self._fingerprint: Fingerprint | None = None
        self._checked_twice = False
        self._dtype = dtype
        self._take(parameters)

    def _take(self, names: Sequence[str] | None) -> None:
        """Let w be these parameters."""
        self._parameters = chosen(self.model, names)
        first, *others = (p.dtype for p in self._parameters.values())
        widest = reduce(torch.promote_types, others, first)
        self.dtype = self._dtype or (widest if widest.itemsize > 2 else torch.float32)
        self.device = next(iter(self._parameters.values())).device
        self._sizes = [p.numel() for p in self._parameters.values()]
        self.n = sum(self._sizes)

    def within(self, names: Sequence[str]) -> "Objective":
        """Return the same loss as a function of some of the parameters alone, by name."""
        objective = copy.copy(self)
        objective._take(names)
        return objective

    @property
    def names(self) -> list[str]:
        """The names of the parameters that are w."""
        return list(self._parameters)

    @property
    def weights(self) -> Tensor:
        """The weights w, copied into a new tensor (n,)."""
        return self.flatten([p.detach() for p in self._parameters.values()])

    @property
    def shapes(self) -> list[torch.Size]:
        """The shape of each parameter."""
        return [p.shape for p in self._parameters.values()]

    @property
    def version(self) -> tuple[int, ...]:
        """Another one whenever a weight has been written in place."""
        return tuple(p._version for p in self._parameters.values())

    @property
    def samples(self) -> int:
        """N, on all ranks together; where no pass has been made yet, one is, without the model."""
        if self._fingerprint is None:
            for _ in self._yield_pass():
                pass
        assert self._fingerprint is not None
        return int(self.total(torch.tensor(float(self._fingerprint.samples), dtype=torch.float64)))

    @contextmanager
    def seen_from(self, weights: Tensor) -> Iterator["Objective"]:
        """Give the same loss with w at other weights (n,), exactly those: w + (w' - w) would be off by rounding."""
        there = copy.copy(self)
        there._parameters = dict(zip(self.names, self.unflatten(weights), strict=True))
        try:
            yield there
        finally:
            self.passes, self._fingerprint = there.passes, there._fingerprint

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy one tensor a parameter into a vector (n,)."""
        return torch.cat([t.reshape(-1).to(self.device, self.dtype) for t in tensors])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector (n,) into one view a parameter, of its shape."""
        if vector.shape != (self.n,):
            raise ValueError(
                f"a vector of shape {tuple(vector.shape)} was given, and these weights are one of shape ({self.n},): "
                "make it with flatten(), from one tensor a parameter"
            )
        parts = torch.split(vector.to(self.device, self.dtype), self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self._parameters.values(), strict=True)]

    def loss(self, e: Tensor | None = None, *, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return L(w + e) as a 0-dim float64 tensor, for e of shape (n,); None is 0.

        Args:
            e: where to, from w.
            buffers: in place of the model's own, by name, such as statistics that :meth:`statistics` has estimated.
        """
        weights = self._at(e)

        @torch.no_grad()
        def of(batch: Any) -> list[Tensor]:
            return [self._mean_loss(weights, batch, buffers).to(accumulator(self.device))]

        return self.average(of)[0]

    def gradient(self, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return L(w + e), a 0-dim float64 tensor, and its gradient there, (n,)."""

        def of(batch: Any) -> list[Tensor]:
            weights = [w.requires_grad_() for w in self._at(e)]
            loss = self._mean_loss(weights, batch)
            found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            return [loss.detach().to(accumulator(self.device)), self.flatten(found)]

        loss, gradient = self.average(of)
        return loss, gradient

    def linearized(self, batch: Any) -> Callable[[Tensor], Tensor]:
        """Return v -> H v for vectors v (k, n), with H the Hessian of the batch's mean loss at w.

        The gradient's graph is made once, and lives as long as what is returned.
        """
        weights = [w.requires_grad_() for w in self._at(None)]
        loss = self._mean_loss(weights, batch)
        gradient = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
        if not self._checked_twice:
            check_twice(gradient)
            self._checked_twice = True
        curved = [i for i, g in enumerate(gradient) if g.requires_grad]  # the others are constants

        def product(v: Tensor) -> Tensor:
            parts = self.unflatten(v)
            found = torch.autograd.grad(
                [gradient[i] for i in curved],
                weights,
                [parts[i] for i in curved],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return self.flatten(found)

        return lambda vs: torch.stack([product(v) if curved else torch.zeros_like(v) for v in vs])

    @property
    def in_one_batch(self) -> bool:
        """Whether all data of this rank are known to be one batch, so that its graph can be kept."""
        return self._batches.number == 1

    def average(self, of: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        """Make a pass: average over all samples what ``of`` a batch gives as means over its own."""
        totals: list[Tensor] = []
        for index, (batch, size) in enumerate(self._yield_pass()):
            with self._quietly(index):
                parts = [part.mul_(size) for part in of(batch)]
            totals = [t.add_(p) for t, p in zip(totals, parts, strict=True)] if totals else parts
        samples = self.samples
        if samples == 0:
            raise ValueError("data: there are no samples, and a mean loss needs some")
        return [self.total(t) / samples for t in totals]

    def apart(self, m: int) -> Iterator["Objective"]:
        """Yield the loss over each m samples, as an objective of its own, of this rank alone.

        Raises:
            ValueError: m below 1.
        """
        if m < 1:
            raise ValueError(f"m={m}: a part needs at least one sample")
        for batch, _ in self._yield_pass():
            for part in self._batches.parts(batch, m):
                objective = copy.copy(self)
                objective.group, objective._fingerprint, objective._batches = None, None, self._batches.only(part)
                yield objective

    def statistics(self, e: Tensor | None = None) -> dict[str, Tensor]:
        """Estimate BatchNorm's running statistics at w + e, as the mean of the batches', in one pass.

        Between two solutions the running statistics of neither are right, and L with them says little of the weights
        there. Izmailov et al. 2018, https://arxiv.org/abs/1803.05407.
        """
        norms = {k: m for k, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        places = [(k, b) for k, b in self.model.named_buffers() if k.rpartition(".")[0] in norms]
        with torch.inference_mode(mode=False):
            buffers = {k: cast(torch.full_like(b, k.endswith("running_var")), self.dtype) for k, b in places}
        weights, momenta = self._at(e), {m: m.momentum for m in norms.values()}

        @torch.no_grad()
        def of(batch: Any) -> list[Tensor]:
            self._mean_loss(weights, batch, buffers, train=True)
            return []

        try:
            for m in momenta:
                m.momentum = None  # a mean of all batches, not a running one
            self.average(of)
        finally:
            for m, momentum in momenta.items():
                m.momentum = momentum
        return {k: self.total(b.double()).div(self.ranks).to(b.dtype) for k, b in buffers.items()}

    def _at(self, e: Tensor | None) -> list[Tensor]:
        """The weights at w + e, one a parameter; where nothing moves, they share memory with the model's."""
        weights = [p.detach().to(self.dtype) for p in self._parameters.values()]
        return weights if e is None else [w + part for w, part in zip(weights, self.unflatten(e), strict=True)]

    def _mean_loss(
        self, weights: Sequence[Tensor], batch: Any, buffers: Mapping[str, Tensor] | None = None, *, train: bool = False
    ) -> Tensor:
        """The mean loss of a batch, by the model with these weights and buffers; ``train`` writes into those given."""
        given = buffers or {}
        state = {k: given.get(k, b).clone() for k, b in self.model.named_buffers()} | (dict(given) if train else {})
        dtype = None if all(p.dtype == self.dtype for p in self.model.parameters()) else self.dtype
        if dtype is not None:
            state |= {k: p.detach() for k, p in self.model.named_parameters()}
            state = {k: cast(t, dtype) for k, t in state.items()}
        state |= dict(zip(self._parameters, weights, strict=True))
        with modes(self.model, norms=train or self.batch_norm == "train"):
            loss = functional_call(self._evaluation, {f"model.{k}": t for k, t in state.items()}, (cast(batch, dtype),))
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss of a batch is {got}, and its mean is needed, a 0-dim tensor")
        return loss

    def _yield_pass(self) -> Iterator[tuple[Any, int]]:
        """Make a pass: each batch, on the weights' device, with its size."""
        seen, batches = Fingerprint(), None
        for index in count():
            with self._generators(index):  # a DataLoader draws, too
                batches = iter(self._batches) if batches is None else batches
                found = next(batches, None)
            if found is None:
                break
            there = cast(found[0], device=self.device)
            seen.add(there, found[1])
            yield there, found[1]
        if self._fingerprint is not None:
            seen.compare(self._fingerprint)
        self._fingerprint = seen
        self.passes += 1
        if self._progress is not None:
            self._progress(self.stage, self.passes)

    @contextmanager
    def _quietly(self, index: int) -> Iterator[None]:
        """Use kernels that can be differentiated twice, and generators of our own."""
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            self._generators(index),
            twice_differentiable(self.model),
        ):
            yield

    @contextmanager
    def _generators(self, index: int) -> Iterator[None]:
        """Let everything draw the same in every pass, and the program's generators be where they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(self.seed + index)
            for device in devices:
                torch.cuda.default_generators[device.index or 0].manual_seed(self.seed + index)
            yield

    @property
    def ranks(self) -> int:
        """How many processes share the data."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def total(self, mine: Tensor) -> Tensor:
        """Sum over all ranks."""
        if self.group is not None:
            home, mine = mine.device, mine.to(self.device)
            dist.all_reduce(mine, group=self.group)
            mine = mine.to(home)
        return mine
