"""Reversible displacement of the weights, w -> w + e -> w: exact to the bit, in the same storage."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from steppe._tensors.dtensor import all_plain, locals_of
from steppe._tensors.in_place import add_scaled_, copy_, real_views, reuse, write_marks

Add: TypeAlias = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], None]


class Displacement:
    """Displaces weights from w and restores them bit for bit.

    A copy of w is restored. Subtracting e from w + e would be off in the last bits. The weights keep their storage, so
    that views, graphs and optimizer states stay valid. The copies are allocated once and reused.

    >>> w = torch.tensor([0.1, 0.2])
    >>> with Displacement().displaced([w], torch.tensor(1e9), [torch.tensor([1.0, -3.0])]):
    ...     w
    tensor([ 1.0000e+09, -3.0000e+09])
    >>> w
    tensor([0.1000, 0.2000])
    """

    def __init__(self) -> None:
        # Keyed by id, not by tensor: Tensor.__hash__ is a Python call, and would be made for every weight.
        self._copies: dict[int, Tensor] = {}
        self._displaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.latest_copies: dict[int, tuple[Tensor, Tensor]] = {}
        """The weights of the latest displacement, by id, with the copies from which they were restored."""
        self._watch: tuple[list[Tensor], list[tuple[int, int]], Sequence[Tensor]] = ([], [], [])
        """Weights that are watched for writes, with their marks and (when values are compared) their norms."""

    @property
    def active(self) -> bool:
        """True if any weight is displaced from w."""
        return bool(self._displaced)

    @torch.no_grad()
    def displace(
        self, weights: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor], *, add: Add = add_scaled_
    ) -> None:
        """Add e = alpha * direction to the weights. Further calls add to it; w stays the point to restore.

        Args:
            weights: Leaf tensors of any dtype, each displaced once even if it is listed twice.
            alpha: A 0-dim tensor.
            direction: One real tensor a weight, of its shape (complex weights: with a last dimension of 2).
            add: An in-place addition, ``add(weights, alpha, direction)``.
        """
        new = dict(zip(map(id, weights), weights, strict=True))
        if len(new) < len(weights):
            first = [next(i for i, weight in enumerate(weights) if weight is one) for one in new.values()]
            weights, direction = list(new.values()), [direction[i] for i in first]
        if self._displaced:
            new = {key: w for key, w in new.items() if key not in self._displaced}
        shards = locals_of(list(new.values()))
        copies = reuse(list(map(self._copies.get, new)), like=shards)
        copy_(copies, shards)
        self._copies.update(zip(new, copies, strict=True))
        # Registered before the weights change: an interrupt during the addition is undone by restore() as well.
        self._displaced.update(zip(new, zip(new.values(), copies, strict=True), strict=True))
        add(real_views(weights), alpha, direction)

    def saved(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's copies of w, for weights that are displaced."""
        return [self._displaced[id(w)][1] for w in weights]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each displaced weight with this rank's copy of w."""
        return list(self._displaced.values())

    @torch.no_grad()
    def watch(self, *, values: bool) -> None:
        """Watch for writes to the displaced weights, which :meth:`restore` will lose.

        Args:
            values: Compare the norms of the weights, too: ``w.data.copy_(...)`` leaves no mark.
        """
        weights = [w for w, _ in self._displaced.values()]
        if not all_plain(weights):
            weights = []
        norms = torch._foreach_norm(weights) if values and weights else []
        self._watch = weights, write_marks(weights), norms  # assigned as one: an interrupt leaves no half of a watch

    @torch.no_grad()
    def written(self) -> int:
        """Return how many weights were written since :meth:`watch`, and end the watch."""
        watched, marks, before = self._watch
        self._watch = [], [], []
        marked = sum(now != mark for now, mark in zip(write_marks(watched), marks, strict=True))
        if marked or not before:
            return marked
        now = torch._foreach_norm(watched)
        return sum(bool(a.ne(b)) for a, b in zip(before, now, strict=True))

    def restore(self) -> None:
        """Restore every displaced weight to w; without a displacement, do nothing."""
        if self._displaced:
            write(self.pairs())
            self.latest_copies = self._displaced
            self._displaced = {}

    def forget_others(self, kept: Set[int]) -> None:
        """Free the copies of weights whose id is not among these, unless they are displaced."""
        for key in self._copies.keys() - kept - self._displaced.keys():
            del self._copies[key]

    @contextmanager
    def displaced(self, weights: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor]) -> Iterator[None]:
        """Displace weights by alpha * direction in the ``with`` block, and restore them, also on an exception."""
        try:
            self.displace(weights, alpha, direction)
            yield
        finally:
            self.restore()


@torch.no_grad()
def write(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write this rank's copies of w into the weights."""
    copy_(locals_of([weight for weight, _ in pairs]), [copy for _, copy in pairs])
