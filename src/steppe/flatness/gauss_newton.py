"""The generalized Gauss-Newton matrix: the curvature of the loss in the outputs, without that of the network."""

from typing import Any

import torch
from torch import Tensor

from steppe._tensors.graph import derivatives
from steppe.flatness._curvature import Curvature, Product
from steppe.flatness._forward import Evaluated
from steppe.flatness._outputs import Jacobian, loss_inputs, zero_product


class GaussNewton(Curvature):
    """The generalized Gauss-Newton matrix of the mean loss, G = 1/N sum_i J_i' (d^2 l_i / dz^2) J_i.

    z are the outputs of the network, J_i = dz_i / dw. G is the Hessian of the loss if the network is replaced by its
    linearization at w, so H = G + 1/N sum_i sum_c (dl_i / dz_c) d^2 z_ic / dw^2. G is positive semi-definite for a loss
    that is convex in the outputs. The second derivative of the loss is exact, by automatic differentiation.

    For a cross-entropy of logits G **is the Fisher information**, 1/N sum_i E_y~p(x_i) g g' with the gradient g of
    -log p(y | x_i): the expectation over the labels that the model itself predicts is exact, and no labels are drawn.
    The same holds for half the squared error, with a Gaussian of unit variance.
    For the true labels in place of predicted ones see :class:`EmpiricalFisher`.

    Args:
        objective: The loss as a function of n weights, with ``loss=``, an ``evaluate=`` that returns the outputs, too,
            or a model that returns loss and logits. The loss must be a function of the outputs and of constants only.

    Example:
        >>> from steppe.flatness import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> gauss_newton = GaussNewton(Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
        >>> gauss_newton(torch.eye(2))  # of a linear network it is the Hessian
        tensor([[1., 0.],
                [0., 4.]])

    References:
        Schraudolph 2002, Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent, Neural Computation
        14; Martens 2020, New Insights and Perspectives on the Natural Gradient Method,
        https://arxiv.org/abs/1412.1193.
    """

    def _build_product(self, batch: Any) -> Product:
        weights, placed = self.objective.differentiable(batch)

        def build(evaluated: Evaluated) -> tuple[Jacobian, list[Tensor], list[int]] | None:
            self.objective.check_leaves(evaluated.loss, batch)
            outputs = loss_inputs(evaluated, weights, "Gauss-Newton matrix")
            if not outputs:
                return None
            slopes = torch.autograd.grad(evaluated.loss, outputs, create_graph=True)
            curved = [i for i, slope in enumerate(slopes) if slope.requires_grad]  # the loss is linear in the others
            jacobian = Jacobian.of(outputs, weights)
            self._check([*slopes, *jacobian.pullback])
            return jacobian, list(slopes), curved

        built = placed.run_evaluated(build)
        if built is None or not built[2]:
            return lambda vectors: zero_product(self.objective, vectors)
        jacobian, slopes, curved = built

        def product(v: Tensor) -> Tensor:
            def multiply(_: object) -> Tensor:
                tangents = jacobian.times(self.objective.unflatten(v))
                along = [slopes[i] for i in curved], jacobian.outputs, [tangents[i] for i in curved]
                bent = derivatives(*along, retain_graph=True)
                return self.objective.flatten(jacobian.transposed_times(bent))

            return placed.run(multiply)

        return lambda vectors: torch.stack([product(v) for v in vectors])
