"""Context managers that leave a model and the global random generators as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from steppe._engine.generators import Generators
from steppe.flatness._isolation import evaluation_mode


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer, and the CPU for a model without any."""
    tensors = (tensor for found in (model.parameters(), model.buffers()) for tensor in found)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluate a model: without gradients, in evaluation mode, and with its buffers restored on exit."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with evaluation_mode(model, train_norms=False), torch.no_grad():
            yield
    finally:
        for buffer, before in buffers:
            buffer.data.copy_(before)


@contextmanager
def restored_generators(device: torch.device) -> Iterator[None]:
    """Restore the global generators of torch (the CPU's and the device's), Python and NumPy on exit."""
    generators = Generators([device])
    before = generators.save()
    try:
        yield
    finally:
        generators.restore(before)


def seed_generators_with_device(seed: int, device: torch.device) -> None:
    """Seed the global generators of torch (the CPU's and the device's), Python and NumPy."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
