"""Products with the Hessian by differences of gradients, for models without second derivatives."""

import torch
from torch import Tensor

from steppe._tensors.reductions import norm
from steppe.flatness._orthogonal import row_norms
from steppe.flatness.objective import Objective


class FiniteDifferenceHessian:
    """The Hessian by central differences of gradients, H v ~ |v| (g(w + h u) - g(w - h u)) / 2h with u = v / |v|.

    Choose it only where :class:`~steppe.flatness.Hessian` raises an error because an operation has no second
    derivative, such as the attention of the flash-attn package. A product takes two gradients, and is not exact: for a
    smooth loss its error is h^2 / 6 times the third derivative along u, and about eps |g| / h by rounding. Compute in
    ``dtype=torch.float64`` where the kernels allow it. In float32 three digits are usual, and a ReLU network has no
    third derivative: there the error can be of the size of the result. :meth:`relative_error` estimates it.

    Args:
        objective: The loss as a function of n weights.
        step: h, the distance from w; by default eps^(1/3) |w|, with the machine epsilon eps of the dtype.

    Raises:
        ValueError: ``step`` is not positive.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> loss = torch.nn.functional.mse_loss
        >>> hessian = FiniteDifferenceHessian(Objective(model, (x, y), loss=loss, dtype=torch.float64))
        >>> hessian(torch.eye(2, dtype=torch.float64)).round(decimals=6).abs()
        tensor([[1., 0.],
                [0., 4.]], dtype=torch.float64)
    """

    def __init__(self, objective: Objective, *, step: float | None = None) -> None:
        if step is not None and not step > 0:
            raise ValueError(f"step={step}: the distance between the gradients must be positive")
        self.objective, self._step = objective, step
        self.n, self.dtype, self.device = objective.n, objective.dtype, objective.device

    @property
    def step(self) -> float:
        """The distance h of both gradients from w."""
        length = float(norm([self.objective.weights]))
        return self._step or torch.finfo(self.dtype).eps ** (1 / 3) * (length or 1.0)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return V H for vectors V in rows, (k, n) -> (k, n), in 2 k passes over the data."""
        return self._products(vectors, self.step)

    def relative_error(self, vectors: Tensor) -> Tensor:
        """Estimate |H v - its approximation| / |H v| for each row, (k, n) -> (k,), float64, in 4 k passes.

        It is the relative difference of the products with h and with 2 h, three times the error of a smooth loss.
        """
        near, far = (self._products(vectors, h) for h in (self.step, 2 * self.step))
        return row_norms(far - near) / row_norms(near)

    def _products(self, vectors: Tensor, h: float) -> Tensor:
        return torch.stack([self._product(v, h) for v in vectors])

    def _product(self, v: Tensor, h: float) -> Tensor:
        length = float(norm([v]))
        if length == 0:
            return torch.zeros_like(v)
        e = v * (h / length)
        (_, above), (_, below) = self.objective.gradient(e), self.objective.gradient(-e)
        return (above - below) * (length / (2 * h))
