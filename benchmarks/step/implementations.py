"""The implementations of SAM that are timed, the plain base optimizer, and the lower bound.

Each builder returns a step around SGD. Its two gradients are assigned directly instead of computed by a backward.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import classic_sam
import steppe

AssignGradients: TypeAlias = Callable[[], None]
"""Assign the gradients, in place of a backward."""

Step: TypeAlias = Callable[[AssignGradients], None]
Builder: TypeAlias = Callable[[Sequence[nn.Parameter]], Step]

RHO, LR = 0.05, 1e-9  # the learning rate is so small that the weights do not change


def implementations(classic: Path | None, peers: Path | None) -> tuple[dict[str, Builder], dict[str, str | None]]:
    """Return the builders of the available implementations, the base first, and the versions of the others."""
    builders, versions = {"base": base, "steppe": steppe_sam}, {}
    if classic is not None:
        builders["classic"] = first_and_second_step(classic_sam.load(classic).SAM)
        versions["classic sam.py"] = classic_sam.version(classic)
    if peers is not None:
        sys.path.append(str(peers))
        builders["pytorch_optimizer"] = first_and_second_step(importlib.import_module("pytorch_optimizer").SAM)
        versions["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
    return builders, versions


def base(parameters: Sequence[nn.Parameter]) -> Step:
    """Build the step that is subtracted from all times: two assignments of gradients, the base's step, zero_grad."""
    optimizer = torch.optim.SGD(parameters, lr=LR)

    def step(assign: AssignGradients) -> None:
        assign()
        assign()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steppe_sam(parameters: Sequence[nn.Parameter]) -> Step:
    """Build Steppe's step with ``passes()``; its check for NaN and inf before the base's step is part of its time."""
    optimizer = steppe.SAM(torch.optim.SGD(parameters, lr=LR), rho=RHO)

    def step(assign: AssignGradients) -> None:
        for sam_pass in optimizer.passes():
            with sam_pass:
                assign()
        optimizer.step()

    return step


def first_and_second_step(cls: Callable[..., Any]) -> Builder:
    """Return the builder for a class with the classic API."""

    def build(parameters: Sequence[nn.Parameter]) -> Step:
        optimizer = cls(parameters, torch.optim.SGD, rho=RHO, lr=LR)

        def step(assign: AssignGradients) -> None:
            assign()
            optimizer.first_step(zero_grad=True)
            assign()
            optimizer.second_step(zero_grad=True)

        return step

    return build


class LowerBound:
    """The traffic of a perturbation over one flat buffer, one operation each: norm 1N, copy 2N, add 3N, copy 2N."""

    def __init__(self, size: int, device: str, dtype: torch.dtype) -> None:
        self._w, self._g, self._copy = (torch.zeros(size, device=device, dtype=dtype) for _ in range(3))
        self._length = torch.zeros((), device=device, dtype=dtype)

    def step(self, assign: AssignGradients) -> None:
        """Compute the norm, perturb and restore: 8N."""
        torch.linalg.vector_norm(self._g, out=self._length)
        self._copy.copy_(self._w)
        self._w.add_(self._g, alpha=RHO)
        self._w.copy_(self._copy)

    def copy(self, assign: AssignGradients) -> None:
        """Copy everything once: 2N."""
        self._copy.copy_(self._w)


def tensors(
    shapes: dict[str, tuple[int, ...]], device: str, dtype: torch.dtype
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Return weights and gradients of these shapes."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype).mul_(0.02)) for shape in shapes.values()]
    return weights, [torch.randn(shape, device=device, dtype=dtype) for shape in shapes.values()]
