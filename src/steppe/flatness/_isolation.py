"""Context managers that run a model on copies, in evaluation mode and with seeded random generators."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from steppe._engine.attributes import AttributesOnCopies
from steppe._engine.generators import Generators
from steppe._engine.registrations import restore_entries

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
def on_copies(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of the model's parameters and buffers, by name, and copies in that of its attributes.

    On exit the model has its own again, and its random generators their states. A tensor is replaced wherever it is
    registered, and in attributes; in a module with several names once, where ``functional_call`` would replace it for
    each name, and take the replacement for the original.

    Raises:
        ValueError: Two tensors for one parameter, whose names were tied since they were listed.
    """
    modules = list(model.modules())
    own = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    placed = {id(own[name]): tensor for name, tensor in state.items()}
    if len(placed) < len(state):
        names = [name for name, tensor in state.items() if placed[id(own[name])] is not tensor]
        raise ValueError(f"{', '.join(names)} shares its tensor with another name since the objective was made")
    attributes = AttributesOnCopies(modules, placed)
    tables: list[tuple[Any, dict[str, Any]]]
    tables = [(table, dict(table.items())) for m in modules for table in (m._parameters, m._buffers)]
    try:
        attributes.place()
        for table, entries in tables:
            for name, tensor in entries.items():
                if id(tensor) in placed:
                    table[name] = placed[id(tensor)]
        yield
    finally:
        for table, entries in tables:
            restore_entries(table, entries)
        attributes.restore()


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
    """Seed the generators of torch (the CPU's and that of ``device``), Python and NumPy, and restore them on exit."""
    generators = _generators(device)
    before = generators.save()
    try:
        generators.seed(seed)
        yield
    finally:
        generators.restore(before)


@cache
def _generators(device: torch.device) -> Generators:
    return Generators([device])
