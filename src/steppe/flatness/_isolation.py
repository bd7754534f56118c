"""Context managers that restore the model's modes and torch's random generators after a pass."""

from collections.abc import Iterator
from contextlib import contextmanager

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
        yield
    finally:
        for m, training in before.items():
            m.training = training


@contextmanager
def seeded_generators(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the default generators of the CPU and of ``device``, and restore their states on exit."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            torch.cuda.default_generators[cuda.index or 0].manual_seed(seed)
        yield
