"""The reversible move w -> w + e -> w: exact to the bit, in the same storage."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from steppe._tensors.dtensor import locals_of
from steppe._tensors.ops import add_scaled_, copy_, real_views, reuse

Add: TypeAlias = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], None]


class Displacement:
    """Moves weights away from w and brings them back, bit for bit.

    What comes back is a copy of w, not w + e - e, which would be off in the last bits; the weights keep their
    storage, so that views, graphs and optimizer states stay valid. The copies are allocated once and reused.

    >>> w = torch.tensor([0.1, 0.2])
    >>> with Displacement().at([w], torch.tensor(1e9), [torch.tensor([1.0, -3.0])]):
    ...     w
    tensor([ 1.0000e+09, -3.0000e+09])
    >>> w
    tensor([0.1000, 0.2000])
    """

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}  # by id: Tensor.__hash__ is Python, and asked for every weight
        self._away: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def active(self) -> bool:
        """Whether any weight is away from w."""
        return bool(self._away)

    @torch.no_grad()
    def move(
        self, weights: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor], *, add: Add = add_scaled_
    ) -> None:
        """Move on by e = alpha * direction; a later move goes on from there, and w stays what it was.

        Args:
            weights: leaf tensors of any dtype, each moved once even when it is listed twice.
            alpha: a 0-dim tensor.
            direction: one real tensor a weight, of its shape (complex weights: with a last dimension of 2).
            add: how to add, in place.
        """
        pairs = dict(zip(map(id, weights), zip(weights, direction, strict=True), strict=True))
        new = {key: w for key, (w, _) in pairs.items() if key not in self._away}
        parts = locals_of(list(new.values()))
        copies = [reuse(self._copies.get(key), like=part) for key, part in zip(new, parts, strict=True)]
        self._copies.update(zip(new, copies, strict=True))
        copy_(copies, parts)
        away = zip(new.values(), copies, strict=True)
        self._away.update(zip(new, away, strict=True))  # from here on, whatever happens, restore() undoes it
        moved, along = zip(*pairs.values(), strict=True) if pairs else ((), ())
        add(real_views(moved), alpha, along)

    def before(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What this rank holds of w, for weights that are away from it."""
        return [self._away[id(w)][1] for w in weights]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring every weight back to w; without a move before, do nothing."""
        copy_(locals_of([w for w, _ in self._away.values()]), [copy for _, copy in self._away.values()])
        self._away.clear()

    @contextmanager
    def at(self, weights: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor]) -> Iterator[None]:
        """Stay at w + alpha * direction inside the ``with`` block, and be back after it, also on an exception."""
        try:
            self.move(weights, alpha, direction)
            yield
        finally:
            self.restore()
