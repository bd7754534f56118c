"""The groups of an optimizer: the key of SAM's radius in them, and their parameters."""

from collections.abc import Iterator
from itertools import chain

from torch import Tensor
from torch.optim import Optimizer

RHO = "sam_rho"
"""The key of a group's radius, also in checkpoints. "rho" is Adadelta's."""


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Return every parameter of an optimizer, in the order in which checkpoints number them."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def trained_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer that are not frozen, each once."""
    return list(dict.fromkeys(p for p in parameters_of(optimizer) if p.requires_grad))
