"""Options that all integrations share: the method that wraps a base optimizer, its radius, and the model."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from steppe.sam import SAM


class MethodOptions:
    """Wrap base optimizers by ``method(base, model=model, rho=rho, **options)``.

    Args:
        owner: The class that takes these options, for error messages.
        method: :class:`steppe.SAM`, a function of :mod:`steppe.variants`, or any function with that signature.
        rho: The neighborhood radius; None for the method's default.
        ready_made: Where a ready-made :class:`steppe.SAM` is given instead, for error messages.
        **options: Further options of the method.

    Raises:
        TypeError: ``method`` is not a function, or ``rho`` is given twice.
    """

    def __init__(
        self, owner: str, method: Callable[..., SAM], rho: Any = None, *, ready_made: str = "", **options: Any
    ) -> None:
        if not callable(method) or isinstance(method, Optimizer):
            raise TypeError(
                f"method must be a function that wraps a base optimizer, got {method!r}: write {owner}(rho=0.05) or "
                f"{owner}(method=steppe.variants.asam, rho=0.5){ready_made and f'; {ready_made}'}"
            )
        own = method.keywords.get("rho") if isinstance(method, functools.partial) else None
        if rho is not None and own is not None and not _is_from_parser(method, own):
            raise TypeError(f"{owner} got two radii, rho={rho} and the method's own rho={own}: give only one")
        self._owner, self._method = owner, method
        self._options = options if rho is None else {"rho": rho, **options}

    @property
    def are_default(self) -> bool:
        """True if neither a method nor an option was given."""
        return self._method is SAM and not self._options

    @property
    def _name(self) -> str:
        return getattr(self._method, "__name__", repr(self._method))

    def __str__(self) -> str:
        return ", ".join([self._name, *(f"{name}={value}" for name, value in self._options.items())])

    def wrap(self, base: Optimizer, model: nn.Module) -> SAM:
        """Return the method around the base optimizer.

        Raises:
            TypeError: The method does not take these arguments, or returns no :class:`steppe.SAM`.
        """
        try:
            inspect.signature(self._method).bind(base, model=model, **self._options)
        except TypeError as error:
            raise TypeError(
                f"{self._name} cannot be called as method(base, model=model, **options): {error}. A method takes the "
                f"base optimizer, model=, which protects running statistics, and the options of {self._owner}"
            ) from None
        sam = self._method(base, model=model, **self._options)
        if not isinstance(sam, SAM):
            raise TypeError(
                f"{self._name} returned {type(sam).__name__}, and {self._owner} needs a steppe.SAM around the base"
            )
        return sam


def _is_from_parser(method: Any, rho: Any) -> bool:
    """Return True for a partial method of jsonargparse (LightningCLI), which gives all default values as arguments."""
    return SAM in method.args and rho == inspect.signature(SAM).parameters["rho"].default


def set_model_if_missing(sam: SAM, model: nn.Module) -> None:
    """Set the model of a SAM that was made without ``model=``, so that the buffers of the model are protected."""
    if sam.model is None:
        sam.model = model
