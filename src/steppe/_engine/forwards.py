"""Call a function before the forward of every module, for a short time."""

import sys
import threading
from collections.abc import Callable
from weakref import WeakMethod

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


def watch_forwards(function: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Call ``function(module)`` before every forward in this thread, until the returned function is called.

    Args:
        function: A bound method; its object is not kept alive.
    """
    thread, method = threading.get_ident(), WeakMethod(function, lambda _: handle.remove())

    def before_forward(module: nn.Module, inputs: object) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return
        if (alive := method()) is not None:
            alive(module)

    handle = register_module_forward_pre_hook(before_forward)
    return handle.remove


def may_watch_forwards() -> bool:
    """True if ``torch.compile`` was not called: it warns of hooks on all modules, and would compile again."""
    # Read from sys.modules: an import would take seconds. The backends are a private name of torch; nothing else shows
    # that a function was compiled. An entry None is one of torch.compiler.disable.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is None or not any(dynamo.cached_backends.values())
