"""The part that all curvature matrices of a loss have in common: a mean over batches, and the graph that is kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from steppe._tensors.graph import check_twice_differentiable
from steppe.flatness.objective import Objective

Product = Callable[[Tensor], Tensor]
"""V -> V A for the matrix A of one batch, (k, n) -> (k, n)."""


class Curvature(ABC):
    """A symmetric matrix (n, n) at the current weights that is a mean over samples, computed batch by batch.

    One pass over the data multiplies all given vectors and builds the graph of each batch once. If the data are a
    single batch, the graph is kept for further products until the weights change.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.n, self.dtype, self.device = objective.n, objective.dtype, objective.device
        self._kept_product: Product | None = None
        self._checked = False
        self._version: tuple[int, ...] | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return V A for vectors V in rows, (k, n) -> (k, n), in one pass over the data.

        Raises:
            RuntimeError: The model contains an operation without a second derivative.
        """
        if self._version != self.objective.version:
            self._kept_product, self._version = None, self.objective.version

        def batch_product(batch: object) -> list[Tensor]:
            product = self._kept_product or self._build_product(batch)
            if self.objective.is_single_batch:
                self._kept_product = product
            return [product(vectors)]

        (products,) = self.objective.average(batch_product)
        return products

    def free_graph(self) -> None:
        """Free the graph that is kept for further products."""
        self._kept_product = None

    def _check(self, derivative: Sequence[Tensor]) -> None:
        """Raise RuntimeError if a derivative, of the first batch, is itself not differentiable."""
        if not self._checked:
            check_twice_differentiable(derivative)
            self._checked = True

    @abstractmethod
    def _build_product(self, batch: Any) -> Product:
        """Build the graph of one batch, and return the product with its matrix."""
