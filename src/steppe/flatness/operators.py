"""Symmetric matrices given by their products with vectors: the Hessian, T A T, and a diagonal block."""

from typing import Any, Protocol

import torch
from torch import Tensor

from steppe._tensors.graph import derivatives
from steppe.flatness._curvature import Curvature, Product


class Operator(Protocol):
    """A symmetric matrix A (n, n) that multiplies vectors. All spectral estimators accept any operator."""

    @property
    def n(self) -> int:
        """Number of rows and columns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        ...

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return V A for vectors V in rows: (k, n) -> (k, n)."""
        ...


class Hessian(Curvature):
    """The Hessian of the mean loss over the data at the model's current weights, H = 1/N sum_i d^2 l_i / dw^2.

    Products are exact derivatives of the gradient, not finite differences. One pass over the data multiplies all given
    vectors and builds the graph of each batch's gradient once. If the data are a single batch, the graph is kept for
    further products, until the weights or anything else in the model changes.

    In a ReLU network the second derivative is that of the linear pieces: the kinks do not contribute.

    Args:
        objective: The loss as a function of n weights.

    Example:
        >>> from steppe.flatness import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> hessian = Hessian(Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
        >>> hessian(torch.eye(2))
        tensor([[1., 0.],
                [0., 4.]])

    References:
        Pearlmutter 1994, Fast Exact Multiplication by the Hessian, Neural Computation 6.
    """

    def _build_product(self, batch: Any) -> Product:
        weights, placed = self.objective.differentiable(batch)
        gradient = placed.run(lambda loss: self.objective.gradient_of(loss(), weights, batch, create_graph=True))
        self._check(gradient)
        curved = [i for i, g in enumerate(gradient) if g.requires_grad]  # the other gradients are constant

        def product(v: Tensor) -> Tensor:
            parts = self.objective.unflatten(v)
            outputs, along = [gradient[i] for i in curved], [parts[i] for i in curved]
            return self.objective.flatten(placed.run(lambda _: derivatives(outputs, weights, along, retain_graph=True)))

        return lambda vs: torch.stack([product(v) if curved else torch.zeros_like(v) for v in vs])


class Scaled:
    """The operator T A T for a diagonal T; with T = |w| + eta, the Hessian in the metric of ASAM.

    Rescaling two layers with a ReLU between them by alpha and 1/alpha leaves the function of the network unchanged. It
    changes the eigenvalues of H, but not those of |w| H |w|.

    Args:
        operator: A, of n rows.
        scale: The diagonal of T, (n,).

    Example:
        >>> class Identity:
        ...     n, dtype, device = 2, torch.float32, torch.device("cpu")
        ...
        ...     def __call__(self, vectors):
        ...         return vectors
        >>> Scaled(Identity(), torch.tensor([1.0, 3.0]))(torch.eye(2))
        tensor([[1., 0.],
                [0., 9.]])

    References:
        Kwon et al. 2021, ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
        Networks, https://arxiv.org/abs/2102.11600.
    """

    def __init__(self, operator: Operator, scale: Tensor) -> None:
        self._operator, self._scale = operator, scale
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return V T A T for vectors V in rows, (k, n) -> (k, n)."""
        return self._operator(vectors * self._scale) * self._scale


class Block:
    """The diagonal block of A that belongs to a subset of the weights.

    Args:
        operator: A, of n rows.
        mask: (n,), bool; true for the rows and columns of the block.

    Example:
        >>> class Diagonal:
        ...     n, dtype, device = 3, torch.float32, torch.device("cpu")
        ...
        ...     def __call__(self, vectors):
        ...         return vectors * torch.tensor([1.0, 2.0, 3.0])
        >>> Block(Diagonal(), torch.tensor([True, False, True]))(torch.eye(2))
        tensor([[1., 0.],
                [0., 3.]])
    """

    def __init__(self, operator: Operator, mask: Tensor) -> None:
        self._operator, self._mask = operator, mask
        self.n, self.dtype, self.device = int(mask.sum()), operator.dtype, operator.device

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return V B for vectors V in rows, (k, m) -> (k, m), where B is the block of m rows."""
        padded = vectors.new_zeros(len(vectors), len(self._mask))
        padded[:, self._mask] = vectors
        return self._operator(padded)[:, self._mask]
