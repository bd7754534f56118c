"""Find out if a loss depends on given parameters."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


def depends_on(loss: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Return True if the graph of a loss reaches one of the parameters, or a function that may hide them.

    >>> import torch
    >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> depends_on((2 * a).sum(), [a]), depends_on((2 * a).sum(), [b])
    (True, False)
    """
    ids = set(map(id, parameters))
    todo: list[Any] = [loss.grad_fn]
    seen = set(todo)
    while todo:  # depth first: the parameters of the last layer are near
        node = todo.pop()
        # A function in Python (activation checkpointing, ...) may use parameters that are not among its inputs.
        if isinstance(node, BackwardCFunction) or id(getattr(node, "variable", None)) in ids:
            return True
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(new)
        todo += new
    return False
