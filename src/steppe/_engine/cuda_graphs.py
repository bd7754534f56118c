"""The state of CUDA graphs, for modules above and below the engine."""

import torch
from torch import Tensor


def is_capturing(parameter: Tensor) -> bool:
    """Return True if the current stream captures a graph; tests on fake tensors replace this function."""
    return parameter.is_cuda and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
