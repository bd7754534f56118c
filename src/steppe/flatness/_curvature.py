"""The part that all curvature matrices of a loss have in common: a mean over batches, and the graph that is kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steppe._tensors.graph import check_twice_differentiable
from steppe.flatness.objective import Objective

Product = Callable[[Tensor], Tensor]
"""V -> V A for the matrix A of one batch, (k, n) -> (k, n)."""


@dataclass(frozen=True, eq=False)
class _KeptGraph:
    """The product with the matrix of the only batch, and copies of the tensors that it was built for.

    Torch's version counters would miss changes: fused optimizers and writes through ``.data`` leave them as they are.
    """

    product: Product
    _state: list[Tensor]

    def is_of(self, state: list[Tensor]) -> bool:
        """Return True if these tensors have the values of the copies."""
        kinds = [[(t.shape, t.dtype, t.device) for t in tensors] for tensors in (self._state, state)]
        return kinds[0] == kinds[1] and all(map(torch.equal, self._state, state))


class Curvature(ABC):
    """A symmetric matrix (n, n) at the current weights that is a mean over samples, computed batch by batch.

    One pass over the data multiplies all given vectors and builds the graph of each batch once. If the data are a
    single batch, the graph is kept for further products, until the weights or anything else in the model changes.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.n, self.dtype, self.device = objective.n, objective.dtype, objective.device
        self._kept: _KeptGraph | None = None
        self._checked = False

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return V A for vectors V in rows, (k, n) -> (k, n), in one pass over the data.

        Raises:
            RuntimeError: The model contains an operation without a second derivative.
        """
        if self._kept is not None and not self._kept.is_of(self.objective.state):
            self._kept = None

        def batch_product(batch: object) -> list[Tensor]:
            if self._kept is not None:
                return [self._kept.product(vectors)]
            state = [t.detach().clone() for t in self.objective.state] if self.objective.is_single_batch else None
            product = self._build_product(batch)
            self._kept = None if state is None else _KeptGraph(product, state)
            return [product(vectors)]

        (products,) = self.objective.average(batch_product)
        return products

    def free_graph(self) -> None:
        """Free the graph that is kept for further products."""
        self._kept = None

    def _check(self, derivative: Sequence[Tensor]) -> None:
        """Raise RuntimeError if a derivative, of the first batch, is itself not differentiable."""
        if not self._checked:
            check_twice_differentiable(derivative)
            self._checked = True

    @abstractmethod
    def _build_product(self, batch: Any) -> Product:
        """Build the graph of one batch, and return the product with its matrix."""
