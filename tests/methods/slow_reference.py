"""Shared by the slow references of perturbations: the notation of the papers, in float64, without the package.

A reference is called once per step as ``reference(g, rho, w)`` with lists of one tensor per parameter, and returns e as
a list. One with a memory is an object.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

Tensors = list[Tensor]
Reference = Callable[[Tensors, float, Tensors | None], Tensors]


def length(x: Tensors) -> Tensor:
    return sum(part.square().sum() for part in x).sqrt()


def along(d: Tensors, rho: float) -> Tensors:
    """rho d / |d|."""
    return [rho * part / length(d) for part in d]


def generator(name: str, seed: int, step: int, position: int) -> torch.Generator:
    """The generator of a draw, which depends on the name, the seed, the step and the parameter's position only."""
    text = f"{name}/{seed}/{step}/{position}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def sam_numbers(g: Tensors, rho: float) -> list[float]:
    """SAM's e as a list of numbers."""
    numbers = [x for part in g for x in part.reshape(-1).tolist()]
    norm = math.sqrt(math.fsum(x * x for x in numbers))
    return [rho * x / norm for x in numbers]


def as_tensors(numbers: list[float], like: Tensors) -> Tensors:
    left = iter(numbers)
    return [torch.tensor([next(left) for _ in range(p.numel())], dtype=p.dtype).reshape(p.shape) for p in like]


def trajectory(
    L: Callable[[Tensors, int], Tensor],
    w: Tensors,
    reference: Reference,
    base: Callable[[Tensors], Optimizer],
    *,
    rho: float,
    steps: int,
) -> Tensors:
    """w after some steps: g of batch t at w, e(g), g_s of the same batch at w + e, a base step from w with g_s."""
    w = [part.detach().clone().requires_grad_() for part in w]
    optimizer = base(w)
    for t in range(steps):
        g = torch.autograd.grad(L(w, t), w)
        e = reference([part.detach() for part in g], rho, [part.detach() for part in w])
        perturbed = [(part.detach() + d).requires_grad_() for part, d in zip(w, e, strict=True)]
        g_s = torch.autograd.grad(L(perturbed, t), perturbed)
        for part, grad in zip(w, g_s, strict=True):
            part.grad = grad
        optimizer.step()
    return [part.detach() for part in w]
