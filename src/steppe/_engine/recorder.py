"""Record what the steps of an optimizer did, for :meth:`steppe.SAM.report`: tensors that nothing reads until then."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._engine.cuda_graphs import is_capturing
from steppe._engine.groups import RHO, parameters_of
from steppe._engine.losses import find_loss
from steppe._tensors.dtensor import by_placement, foreach, local, sum_over_ranks
from steppe._tensors.in_place import as_real
from steppe._tensors.reductions import accumulator, norm

_EARLY, _INTERVAL = (0, 8, 64), 128
"""Perturbed steps that are measured: these, and one of each so many."""
_KEPT = 32
"""Measured steps that are kept."""
_PIECE = 1 << 20
"""Entries of the weights whose difference is in memory at once, and entries of a gradient that are kept."""


@dataclass
class Sample:
    """What was measured in one perturbed step; tensors on the device, with one row per group."""

    rho: list[float | Tensor]
    lengths: Tensor
    """|e|^2 and |w|^2, of shape (groups, 2)."""
    angles: Tensor | None = None
    """|g|^2, |g_s - g|^2 and |g_s|^2, of shape (groups, 3), over the sampled entries; None without g."""
    loss: Tensor | None = None
    perturbed_loss: Tensor | None = None
    entries: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    """Each parameter with the sampled entries of g, by group; empty once the angles are known."""
    stride: int = 1
    """Distance of the sampled entries of g."""


class Recorder:
    """Counts the steps of an optimizer, and measures few of them.

    Args:
        base: The base optimizer.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._model: nn.Module | None = None
        self._sample: Sample | None = None
        self._perturbed = False
        self._loss: Tensor | None = None
        self.steps = 0
        """Number of steps with passes."""
        self.plain_steps = 0
        """Number of steps of the base without passes."""
        self.perturbed_steps = 0
        """Number of perturbed steps."""
        self.steps_in_evaluation_mode = 0
        """Number of perturbations while the model was in evaluation mode."""
        self.samples: deque[Sample] = deque(maxlen=_KEPT)
        """The measured steps."""

    def watch(self, model: nn.Module | None) -> None:
        """Set the module of which the training mode is recorded; one that trains nothing has no mode to record."""
        trains = model is not None and any(p.requires_grad for p in model.parameters())
        self._model = model if trains else None

    def perturbation(
        self,
        displaced: Callable[[], Sequence[tuple[Tensor, Tensor]]],
        parameters: Sequence[Tensor] = (),
        gradients: Sequence[Tensor] = (),
    ) -> None:
        """Record that the weights were perturbed; called after each ascent step.

        Args:
            displaced: Returns each displaced weight with this rank's copy of w.
            parameters: The parameters with a gradient at w.
            gradients: g of these, as real tensors, or nothing if it is not known.
        """
        is_further_ascent, self._perturbed = self._perturbed, True
        if not is_further_ascent:
            self.steps_in_evaluation_mode += self._model is not None and not _is_training(self._model)
            if self._is_due() and not is_capturing(next(parameters_of(self._base))):
                self._measure(displaced(), parameters, gradients)  # replays of a graph would overwrite it
        elif self._sample is not None:
            self._sample.lengths = self._squared_lengths(displaced())

    @torch.no_grad()
    def _measure(
        self,
        displaced: Sequence[tuple[Tensor, Tensor]],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> None:
        rho = [group[RHO] for group in self._base.param_groups]
        rho = [r.clone() if isinstance(r, Tensor) else r for r in rho]
        self._sample = Sample(rho, self._squared_lengths(displaced))
        if gradients:
            g = dict(zip(parameters, gradients, strict=True))
            stride = self._sample.stride = -(-sum(local(one).numel() for one in gradients) // _PIECE) or 1
            self._sample.entries = [
                [(p, _entries(g[p], stride)) for p in group["params"] if p in g] for group in self._base.param_groups
            ]

    @torch.no_grad()
    def _squared_lengths(self, displaced: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        copies = {id(w): copy for w, copy in displaced}
        return _stack([_lengths(group["params"], copies) for group in self._base.param_groups])

    @torch.no_grad()
    def add_displacement(self, parameters: Sequence[Tensor], e: Tensor, w: Tensor) -> None:
        """Record an e that was added to other weights w, for the group that has one of these parameters."""
        owned = {id(p) for p in parameters}
        groups = [i for i, group in enumerate(self._base.param_groups) if any(id(p) in owned for p in group["params"])]
        if self._sample is not None and groups:
            squares = torch.stack([norm([e]), norm([w])]).square()
            self._sample.lengths[groups[0]] += squares.to(self._sample.lengths)

    def _is_due(self) -> bool:
        n = self.perturbed_steps
        return n % _INTERVAL == 0 or n in _EARLY

    @torch.no_grad()
    def perturbed_gradient(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Record g_s, the gradients of these parameters at w + e, as real tensors."""
        sample = self._sample
        if sample is not None and sample.entries:
            g_s = dict(zip(parameters, gradients, strict=True))
            sample.angles = _stack([_angles(group, g_s, sample.stride) for group in sample.entries])
            sample.entries = []

    def is_measuring(self) -> bool:
        """True if g_s and the losses of this step are recorded."""
        return self._sample is not None

    def unscale(self, scale: Tensor) -> None:
        """Divide the recorded gradient at w by a loss scale."""
        for group in self._sample.entries if self._sample is not None else []:
            for _, g in group:
                g.div_(scale.to(g.device))

    def loss(self, loss: Any, *, is_perturbed: bool) -> None:
        """Record the loss at w or at w + e: a tensor or number, or something that holds one (:func:`find_loss`)."""
        if not is_perturbed and self._is_due():
            self._loss = _as_scalar(loss)
        elif is_perturbed and self._sample is not None:
            self._sample.loss, self._sample.perturbed_loss = self._loss, _as_scalar(loss)

    def count_step(self) -> None:
        """Count a step that the base has taken."""
        self.steps += 1
        self.perturbed_steps += self._perturbed
        if self._sample is not None:
            self._sample.entries = []
            self.samples.append(self._sample)
        self.forget()

    def count_replay(self, *, perturbed: bool) -> None:
        """Count a step that was taken by the replay of a CUDA graph."""
        self.steps += 1
        self.perturbed_steps += perturbed

    def forget(self) -> None:
        """Forget the perturbation of a step that was aborted."""
        self._sample, self._loss, self._perturbed = None, None, False


def _is_training(model: nn.Module) -> bool:
    # a container without a forward, such as that of model=[a, b], has no mode of its own
    return any(m.training for m in model.modules() if not isinstance(m, nn.ModuleList | nn.ModuleDict))


def _stack(rows: Sequence[Tensor]) -> Tensor:
    device = next((row.device for row in rows if not row.is_cpu), rows[0].device)
    return torch.stack([row.to(device, accumulator(device)) for row in rows])


def _lengths(parameters: Sequence[Tensor], copies: Mapping[int, Tensor]) -> Tensor:
    """Return |e|^2 and |w|^2 of one group."""
    rows = [torch.zeros(2, dtype=torch.float64)]
    for placement, positions in by_placement(parameters).items():
        here = [parameters[i] for i in positions]
        moved = [(as_real(local(p.detach())), as_real(copies[id(p)])) for p in here if id(p) in copies]
        e = [norm(pieces) for pieces in _differences(moved)]
        w = norm([as_real(copies.get(id(p), local(p.detach()))) for p in here])
        squares = torch.stack([torch.stack([n.to(w) for n in e]).square().sum() if e else w * 0, w.square()])
        rows.append(sum_over_ranks(squares, placement))
    return _stack(rows).sum(0)


def _differences(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
    """Yield a - b of each pair, of a few million entries at a time."""
    pieces: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        split = [torch.split(t.reshape(-1), _PIECE) if t.numel() > _PIECE else (t,) for t in pair]
        for piece in zip(*split, strict=True):
            if pieces and sum(a.numel() for a, _ in pieces) + piece[0].numel() > _PIECE:
                yield [a - b for a, b in pieces]
                pieces = []
            pieces.append(piece)
    if pieces:
        yield [a - b for a, b in pieces]


def _entries(gradient: Tensor, stride: int) -> Tensor:
    """Return a copy of every stride-th entry of this rank's shard."""
    return torch.slice_copy(local(gradient).reshape(-1), step=stride)


def _angles(group: Sequence[tuple[Tensor, Tensor]], gradients: Mapping[Tensor, Tensor], stride: int) -> Tensor:
    """Return |g|^2, |g_s - g|^2 and |g_s|^2 of one group."""
    rows = [torch.zeros(3, dtype=torch.float64)]
    for placement, positions in by_placement([p for p, _ in group]).items():
        before = [group[i][1] for i in positions]
        found = [gradients.get(group[i][0]) for i in positions]
        after = [
            torch.zeros_like(g) if f is None else _entries(f, stride).to(g.dtype)
            for f, g in zip(found, before, strict=True)
        ]
        between = foreach(torch._foreach_sub, after, before)
        squares = torch.stack([norm(before), norm(between), norm(after)]).square()
        rows.append(sum_over_ranks(squares, placement))
    return _stack(rows).sum(0)


def _as_scalar(loss: Any) -> Tensor | None:
    loss = find_loss(loss)
    if isinstance(loss, Tensor):
        return loss.detach().clone() if loss.numel() == 1 else None
    return torch.tensor(float(loss)) if isinstance(loss, int | float) else None
