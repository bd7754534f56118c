"""Keep torch.compile out of a function."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

_P = ParamSpec("_P")
_R = TypeVar("_R")


def eager(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function outside of compiled graphs, with its signature.

    Dynamo drops what a compiled step writes to attributes: without this, weights would stay perturbed.
    ``torch.compiler.disable`` does the same, but it loses the signature for type checkers, and imports Dynamo at once,
    which doubles the time of ``import steppe``. The private function, which ``torch.optim`` uses, waits for the first
    call.

    >>> @eager
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> double(2)
    4
    """
    return _disable_dynamo(function)
