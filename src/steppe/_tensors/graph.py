"""The graph of a tensor, and derivatives of derivatives."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# The node that `once_differentiable` puts into a graph: torch returns zeros for the derivative.
_ONCE_DIFFERENTIABLE = "torch::autograd::Error"
# Nodes of torch with a wrong second derivative, by the begin of their name: this one holds the norm |v| constant.
_WRONG = {"WeightNormInterface": "torch's weight_norm has a wrong second derivative"}


class NoSecondDerivativeError(RuntimeError):
    """An operation of a model has no second derivative, or a wrong one."""

    def __init__(self, why: object) -> None:
        super().__init__(
            f"An operation of this model has no second derivative ({why}), but the Hessian needs it: for this use an "
            "implementation in plain torch operations (attention: F.scaled_dot_product_attention, "
            "attn_implementation='eager')"
        )


def graph(*roots: Any) -> Iterator[Any]:
    """Yield the nodes of the graph below some nodes, each once, depth first."""
    todo = [node for node in roots if node is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(new)
        todo += new


def derivatives(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    along: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    """Return ``torch.autograd.grad``, in which an input that is not used has the derivative 0."""
    return torch.autograd.grad(
        outputs,
        inputs,
        along,
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def check_twice_differentiable(gradient: Sequence[Tensor | None]) -> None:
    """Refuse to differentiate a gradient, made with its graph, where torch would return a wrong result.

    Raises:
        NoSecondDerivativeError: A function that is marked ``once_differentiable``, or one of torch's own that is wrong.
    """
    for node in graph(*(g.grad_fn for g in gradient if g is not None)):
        name = node.name()
        if name == _ONCE_DIFFERENTIABLE:
            raise NoSecondDerivativeError("it is marked once_differentiable")
        for begin, why in _WRONG.items():
            if name.startswith(begin):
                raise NoSecondDerivativeError(why)
