"""The empirical Fisher matrix: the mean of g g' over the gradients of single samples."""

from typing import Any, Literal

import torch
from torch import Tensor

from steppe.flatness._curvature import Curvature, Product
from steppe.flatness._forward import Evaluated
from steppe.flatness._outputs import Jacobian, loss_inputs, zero_product
from steppe.flatness.objective import Objective


class EmpiricalFisher(Curvature):
    """The empirical Fisher matrix, F = 1/N sum_i g_i g_i', with the gradient g_i of the loss of one sample.

    It is the second moment of the gradients at the true labels, not a curvature: the Fisher information takes the
    expectation over the labels that the model predicts, and is the :class:`GaussNewton` matrix for a cross-entropy.
    They agree where the model fits its data perfectly and the data follow its distribution, and can differ widely
    elsewhere. Its trace is the mean squared norm of the gradients.

    The gradients are not formed one by one: F v = J' D D' J v, with the derivatives D of the losses in the outputs.

    Args:
        objective: As for :class:`GaussNewton`. The loss of a batch must be the mean of one loss per sample.
        per: "sample": one gradient per row of the outputs. "token": one per position of outputs (batch, positions,
            classes), for a loss that is a mean over tokens.

    Raises:
        ValueError: Another ``per``. In a product: outputs that are not one term per sample or token.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> fisher = EmpiricalFisher(Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
        >>> fisher(torch.eye(2))  # the gradients are (2, 0) and (0, 8)
        tensor([[ 2.,  0.],
                [ 0., 32.]])

    References:
        Kunstner et al. 2019, Limitations of the Empirical Fisher Approximation for Natural Gradient Descent,
        https://arxiv.org/abs/1905.12558.
    """

    def __init__(self, objective: Objective, *, per: Literal["sample", "token"] = "sample") -> None:
        if per not in ("sample", "token"):
            raise ValueError(f"per={per!r}: choose 'sample' (a gradient per row of the outputs) or 'token'")
        super().__init__(objective)
        self.per = per

    def _build_product(self, batch: Any) -> Product:
        self.objective.check_mean(batch)
        weights, placed = self.objective.differentiable(batch)
        size = self.objective.size(batch)

        def build(evaluated: Evaluated) -> tuple[Jacobian, Tensor] | None:
            self.objective.check_leaves(evaluated.loss, batch)
            outputs = loss_inputs(evaluated, weights, "empirical Fisher matrix")
            if not outputs:
                return None
            self._check_terms(outputs, size)
            (slopes,) = torch.autograd.grad(evaluated.loss, outputs, retain_graph=True)
            jacobian = Jacobian.of(outputs, weights)
            self._check(jacobian.pullback)
            return jacobian, slopes * size

        built = placed.run_evaluated(build)
        if built is None:
            return lambda vectors: zero_product(self.objective, vectors)
        jacobian, slopes = built
        within = tuple(range(1 if self.per == "sample" else slopes.dim() - 1, slopes.dim()))

        def product(v: Tensor) -> Tensor:
            def multiply(_: object) -> Tensor:
                (tangents,) = jacobian.times(self.objective.unflatten(v))
                along = slopes * tangents  # g_i'v, the sum over the entries of one term
                inner = along.sum(within, keepdim=True) if within else along
                return self.objective.flatten(jacobian.transposed_times([slopes * inner / size]))

            return placed.run(multiply)

        return lambda vectors: torch.stack([product(v) for v in vectors])

    def _check_terms(self, outputs: list[Tensor], size: float) -> None:
        """Raise ValueError unless the loss is known to be the mean of one loss per row, or per position."""
        if len(outputs) > 1:
            raise ValueError(
                f"the loss is a function of {len(outputs)} outputs of the model, but the gradients of single samples "
                "need one tensor with a row per sample: return one tensor from the model"
            )
        shape = tuple(outputs[0].shape)
        if self.per == "sample" and shape[:1] != (size,):
            raise ValueError(
                f"the loss is a mean over {size} samples, but the outputs have shape {shape}, not a row per sample: "
                "choose per='token' for a mean over tokens, or correct size="
            )
        if self.per == "token" and (len(shape) < 3 or outputs[0][..., 0].numel() < size):
            raise ValueError(
                f"per='token' needs outputs (batch, positions, classes) of at least {size} positions, which the loss "
                f"averages over, but they have shape {shape}: choose per='sample', or count tokens with size="
            )
