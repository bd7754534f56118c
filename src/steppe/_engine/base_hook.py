"""Notice a base optimizer that is stepped past the optimizer around it."""

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from steppe._engine.joint_base import optimizers_of


class BeforeStep:
    """A step hook of the base that calls a method, as long as the method's object lives; copies do nothing."""

    def __init__(self, method: Callable[[], None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    @property
    def is_alive(self) -> bool:
        """True if the method's object lives."""
        return self._method is not None and self._method() is not None

    def __call__(self, *_: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method()

    def __reduce__(self) -> tuple[type["BeforeStep"], tuple[()]]:
        return BeforeStep, ()  # some bases copy and pickle their hooks


def call_before_step(base: Optimizer, method: Callable[[], None]) -> None:
    """Call a bound method before each step of the base, as long as the method's object lives."""
    for optimizer in optimizers_of(base):
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):  # a wrapper may leave torch's constructor out: no hooks
            handle = optimizer.register_step_pre_hook(BeforeStep(method))
            weakref.finalize(method.__self__, handle.remove)  # type: ignore[attr-defined]
