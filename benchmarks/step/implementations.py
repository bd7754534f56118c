"""The implementations of SAM that are timed, the plain base optimizer, and the lower bound.

Each builder returns a step around SGD. Its two gradients are assigned directly instead of computed by a backward.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from functools import partial
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


PEERS = ("pytorch_optimizer", "temperon", "sam-pytorch", "heavyball", "unifiedsam", "zij")
"""The distributions in the folder that is given by ``--peers``; those that are missing in it are left out."""

BASES = {"heavyball": "heavyball_base"}
"""The base of an implementation that cannot wrap one of torch; all others have the base called "base"."""


def implementations(classic: Path | None, peers: Path | None) -> tuple[dict[str, Builder], dict[str, str | None]]:
    """Return the builders of the available implementations, the base first, and the versions of the others."""
    builders, versions = {"base": base, "steppe": steppe_sam}, {}
    if peers is not None:
        if not peers.is_dir():
            raise SystemExit(f"{peers} is not a folder; make it by pip install --no-deps --target {peers} ...")
        sys.path.append(str(peers))
        found = {d.name: d.version for d in importlib.metadata.distributions(path=[str(peers)])}
        versions = {
            name: version for name in PEERS if (version := found.get(name) or found.get(name.replace("-", "_")))
        }
        for name in versions:
            builders |= _peer(name)
    if classic is not None:  # last, because its module is called sam, as is that of sam-pytorch
        builders["classic"] = first_and_second_step(classic_sam.load(classic).SAM)
        versions["classic sam.py"] = classic_sam.version(classic)
    return builders, versions


def _peer(name: str) -> dict[str, Builder]:
    """Return the builders of a distribution, each used as in its own documentation."""
    if name == "pytorch_optimizer":
        return {name: first_and_second_step(importlib.import_module("pytorch_optimizer").SAM)}
    if name == "zij":
        module = importlib.import_module("zij")
        return {name: first_and_second_step(module.SAM, module.SGD)}
    if name == "unifiedsam":
        return {name: first_and_second_step(partial(importlib.import_module("unifiedsam").unifiedSAM, lambd=1.0))}
    if name == "temperon":
        cls = importlib.import_module("temperon").Temperon
        return {name: closure_step(lambda base, _: cls(base, total_steps=10**9, tail_frac=1.0, rho=RHO))}
    if name == "sam-pytorch":
        cls = importlib.import_module("sam").SAM
        return {name: closure_step(lambda base, parameters: cls(parameters, base, rho=RHO))}
    return _heavyball()


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


def first_and_second_step(cls: Callable[..., Any], sgd: type = torch.optim.SGD) -> Builder:
    """Return the builder for a class with the classic API."""

    def build(parameters: Sequence[nn.Parameter]) -> Step:
        optimizer = cls(parameters, sgd, rho=RHO, lr=LR)

        def step(assign: AssignGradients) -> None:
            assign()
            optimizer.first_step(zero_grad=True)
            assign()
            optimizer.second_step(zero_grad=True)

        return step

    return build


def closure_step(make: Callable[[torch.optim.Optimizer, Sequence[nn.Parameter]], Any]) -> Builder:
    """Return the builder for an optimizer with ``step(closure)`` around an instance of the base."""

    def build(parameters: Sequence[nn.Parameter]) -> Step:
        optimizer = make(torch.optim.SGD(parameters, lr=LR), parameters)
        return _step_with_closure(optimizer)

    return build


def _step_with_closure(optimizer: Any, own_gradients: Callable[[], None] = lambda: None) -> Step:
    loss = torch.zeros(())

    def step(assign: AssignGradients) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            assign()
            own_gradients()
            return loss

        optimizer.step(closure)

    return step


def _heavyball() -> dict[str, Builder]:
    """Return HeavyBall's wrapper and its own SGD, not compiled, as in its tests on a CPU.

    It overwrites the gradients, so it has its own. Compiling takes minutes for each list of tensors.
    """
    heavyball = importlib.import_module("heavyball")
    heavyball.utils.compile_mode = None

    def build(parameters: Sequence[nn.Parameter], *, perturb: bool) -> Step:
        base = heavyball.SGD(parameters, lr=LR, beta=0.0)
        gradients = [torch.zeros_like(p) for p in parameters]  # it overwrites them with zeros in any case

        def own_gradients() -> None:
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g

        if perturb:
            return _step_with_closure(heavyball.SAMWrapper(parameters, base, ball=RHO), own_gradients)

        def step(assign: AssignGradients) -> None:
            for _ in range(2):
                assign()
                own_gradients()
            base.step()
            base.zero_grad()

        return step

    return {"heavyball": partial(build, perturb=True), BASES["heavyball"]: partial(build, perturb=False)}


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
