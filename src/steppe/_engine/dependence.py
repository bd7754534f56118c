"""Follow the graph of a loss to the parameters on which it depends."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from steppe._tensors.graph import graph


def depends_on(loss: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Return True if the graph of a loss reaches one of the parameters, or a function that may hide them.

    >>> import torch
    >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> depends_on((2 * a).sum(), [a]), depends_on((2 * a).sum(), [b])
    (True, False)
    """
    ids = set(map(id, parameters))
    # A function in Python (activation checkpointing, ...) may use parameters that are not among its inputs.
    return any(isinstance(node, BackwardCFunction) or _is_leaf(node, ids) for node in graph(loss.grad_fn))


def uses_again(loss: Tensor, earlier: set[Any], parameters: Iterable[Tensor]) -> bool:
    """Return True if the graph of a loss has a node of an earlier graph, above one of the parameters."""
    ids = set(map(id, parameters))
    shared = [node for node in graph(loss.grad_fn) if node in earlier and not hasattr(node, "variable")]
    return any(_is_leaf(node, ids) for node in graph(*shared))


def _is_leaf(node: Any, ids: set[int]) -> bool:
    return id(getattr(node, "variable", None)) in ids
