"""Context managers that restore the model's modes and attributes and torch's random generators after a pass."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@contextmanager
def evaluation_mode(model: nn.Module, *, train_norms: bool) -> Iterator[None]:
    """Put all modules into evaluation mode, normalization layers into training mode if ``train_norms``.

    On exit each module has its own mode again: ``model.train()`` would overwrite modes that differ between modules.
    """
    before = {m: m.training for m in model.modules()}
    try:
        for m in before:
            m.training = train_norms and isinstance(m, _NORMS)
        with ExitStack() as stack:
            for m in before:
                if _checkpoints_in_training_only(m):
                    stack.enter_context(_checkpointed_evaluation(m))
            yield
    finally:
        for m, training in before.items():
            m.training = training


@contextmanager
def own_attributes(model: nn.Module) -> Iterator[None]:
    """Restore on exit what a forward assigns to the attributes of modules.

    The weight of torch's old ``weight_norm`` is such an attribute, and would stay that of the perturbed parameters. All
    are restored, because a cached tensor belongs to the numbers that are assigned with it.
    """
    before = [(vars(m), dict(vars(m))) for m in model.modules()]
    try:
        yield
    finally:
        for attributes, own in before:
            for name in [name for name, value in attributes.items() if name not in own or value is not own[name]]:
                if name in own:
                    attributes[name] = own[name]
                else:
                    del attributes[name]


def _checkpoints_in_training_only(module: nn.Module) -> bool:
    """Return True for a layer of transformers with activation checkpointing, which it ignores in evaluation mode."""
    names = {c.__name__ for c in type(module).__mro__}
    return "GradientCheckpointingLayer" in names and bool(getattr(module, "gradient_checkpointing", False))


@contextmanager
def _checkpointed_evaluation(layer: nn.Module) -> Iterator[None]:
    """Checkpoint a layer of transformers in evaluation mode.

    The layer is in training mode while it decides whether to checkpoint, but not while it computes.
    """
    original = layer.__dict__["_gradient_checkpointing_func"]

    def evaluate(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def compute(*inputs: Any) -> Any:
            layer.training = False
            try:
                return function(*inputs)
            finally:
                layer.training = True

        return original(compute, *args, **kwargs)

    try:
        layer.__dict__["_gradient_checkpointing_func"] = evaluate
        layer.training = True
        yield
    finally:
        layer.__dict__["_gradient_checkpointing_func"] = original


@contextmanager
def seeded_generators(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the default generators of the CPU and of ``device``, and restore their states on exit."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            torch.cuda.default_generators[cuda.index or 0].manual_seed(seed)
        yield
