"""The methods: one step of SAM around SGD each, whose two gradients are put by hand; the plain base; the floor."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import steppe

Put: TypeAlias = Callable[[], None]
Step: TypeAlias = Callable[[Put], None]
"""One step; its argument is what a backward would do."""
Build: TypeAlias = Callable[[Sequence[nn.Parameter]], Step]

RHO, LR = 0.05, 1e-9  # so small that the weights stay what they are


def base(parameters: Sequence[nn.Parameter]) -> Step:
    """What is taken off everybody's time: the base's step and ``zero_grad``, and the putting of two gradients."""
    optimizer = torch.optim.SGD(parameters, lr=LR)

    def step(put: Put) -> None:
        put()
        put()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(parameters: Sequence[nn.Parameter]) -> Step:
    """Steppe, by ``passes()``; its look for NaN and inf before the base steps is part of its time."""
    optimizer = steppe.SAM(torch.optim.SGD(parameters, lr=LR), rho=RHO)

    def step(put: Put) -> None:
        for sam_pass in optimizer.passes():
            with sam_pass:
                put()
        optimizer.step()

    return step


def first_and_second(cls: Callable[..., Any]) -> Build:
    """A class with the classic API."""

    def build(parameters: Sequence[nn.Parameter]) -> Step:
        optimizer = cls(parameters, torch.optim.SGD, rho=RHO, lr=LR)

        def step(put: Put) -> None:
            put()
            optimizer.first_step(zero_grad=True)
            put()
            optimizer.second_step(zero_grad=True)

        return step

    return build


def found(classic: Path | None, peers: Path | None) -> tuple[dict[str, Build], dict[str, str | None]]:
    """Those that are given, the base first, and the versions of the others."""
    methods, versions = {"base": base, "steppe": ours}, {}
    if classic is not None:
        spec = importlib.util.spec_from_file_location("classic_sam", classic)
        if spec is None or spec.loader is None:
            raise SystemExit(f"--classic {classic}: no Python file; give the sam.py of github.com/davda54/sam")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        methods["classic"] = first_and_second(module.SAM)
        versions["classic sam.py"] = f"git blob {_blob(classic)}"
    if peers is not None:
        sys.path.append(str(peers))
        methods["pytorch_optimizer"] = first_and_second(importlib.import_module("pytorch_optimizer").SAM)
        versions["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
    return methods, versions


def _blob(file: Path) -> str:
    """What git calls this content: it tells which version of a file without one was measured."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()[:7]


class Floor:
    """The same traffic over one flat buffer, in one operation each: norm 1N, copy 2N, add 3N, copy 2N; 8N together."""

    def __init__(self, size: int, device: str, dtype: torch.dtype) -> None:
        self._w, self._g, self._copy = (torch.zeros(size, device=device, dtype=dtype) for _ in range(3))
        self._length = torch.zeros((), device=device, dtype=dtype)

    def step(self, put: Put) -> None:
        """The norm, the way there, and the way back."""
        torch.linalg.vector_norm(self._g, out=self._length)
        self._copy.copy_(self._w)
        self._w.add_(self._g, alpha=RHO)
        self._w.copy_(self._copy)

    def copy(self, put: Put) -> None:
        """One copy of everything: 2N."""
        self._copy.copy_(self._w)


def tensors(
    shapes: dict[str, tuple[int, ...]], device: str, dtype: torch.dtype
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Weights and gradients of these shapes."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype).mul_(0.02)) for shape in shapes.values()]
    return weights, [torch.randn(shape, device=device, dtype=dtype) for shape in shapes.values()]
