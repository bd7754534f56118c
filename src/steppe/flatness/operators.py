"""Matrices that are known by their products with vectors only: the Hessian, and others made of it."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from steppe.flatness.objective import Objective


class Operator(Protocol):
    """A symmetric n x n matrix A, by its products: every estimator of spectra takes any."""

    @property
    def n(self) -> int:
        """Rows and columns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Of its vectors."""
        ...

    def __call__(self, vectors: Tensor) -> Tensor:
        """Multiply vectors, one a row: (k, n) -> (k, n)."""
        ...


class Hessian:
    """The Hessian of the mean loss over the data, H = 1/N sum_i d^2 l_i / dw^2, at the model's weights as they are.

    Each product is exact: the gradient is differentiated, not a difference of two. A pass over the data multiplies as
    many vectors as are given, and makes a gradient's graph for each batch once for all of them; where all data are one
    batch, once for all products, until the weights are changed.

    ReLU networks: a second derivative does not see kinks. It is that of the linear pieces, almost everywhere.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> hessian = Hessian(Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
    >>> hessian(torch.eye(2))
    tensor([[1., 0.],
            [0., 4.]])
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.n, self.dtype, self.device = objective.n, objective.dtype, objective.device
        self._kept: Callable[[Tensor], Tensor] | None = None
        self._version: tuple[int, ...] | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        """Multiply vectors (k, n), in one pass over the data."""
        if self._version != self.objective.version:
            self._kept, self._version = None, self.objective.version

        def of(batch: object) -> list[Tensor]:
            product = self._kept or self.objective.linearized(batch)
            if self.objective.in_one_batch:
                self._kept = product
            return [product(vectors)]

        (products,) = self.objective.average(of)
        return products

    def forget(self) -> None:
        """Free the graph that was kept for further products."""
        self._kept = None


class Scaled:
    """T A T for a diagonal T, given as a vector (n,): with T = |w| + eta, the Hessian in the metric of ASAM.

    Where two layers with a ReLU between them are rescaled by alpha and 1/alpha, the network computes the same function
    with another Hessian, but with the same eigenvalues of |w| H |w|.

    >>> class Eye:
    ...     n, dtype, device = 2, torch.float32, torch.device("cpu")
    ...
    ...     def __call__(self, vectors):
    ...         return vectors
    >>> Scaled(Eye(), torch.tensor([1.0, 3.0]))(torch.eye(2))
    tensor([[1., 0.],
            [0., 9.]])
    """

    def __init__(self, operator: Operator, scale: Tensor) -> None:
        self._operator, self._scale = operator, scale
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device

    def __call__(self, vectors: Tensor) -> Tensor:
        """Multiply vectors (k, n)."""
        return self._operator(vectors * self._scale) * self._scale


class Block:
    """The rows and columns of A that belong to some of the weights, where ``which`` (n,) is true."""

    def __init__(self, operator: Operator, which: Tensor) -> None:
        self._operator, self._which = operator, which
        self.n, self.dtype, self.device = int(which.sum()), operator.dtype, operator.device

    def __call__(self, vectors: Tensor) -> Tensor:
        """Multiply vectors (k, n) of the block's own n."""
        whole = vectors.new_zeros(len(vectors), len(self._which))
        whole[:, self._which] = vectors
        return self._operator(whole)[:, self._which]
