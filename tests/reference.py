"""SAM and ASAM in the notation of their papers: slow, on one flat float64 vector, without code of the package."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer


def loss_and_gradient(L: Callable[[Tensor], Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
    w = w.detach().clone().requires_grad_()
    value = L(w)
    (g,) = torch.autograd.grad(value, w)
    return value.detach(), g


def sam_e(w: Tensor, g: Tensor, rho: float) -> Tensor:
    """e(w) = rho g / |g|_2 (arXiv 2010.01412, equation 2 with p = 2)."""
    return rho * g / g.square().sum().sqrt()


def asam_e(w: Tensor, g: Tensor, rho: float, eta: float = 0.01) -> Tensor:
    """e(w) = rho T_w^2 g / |T_w g|_2 with T_w = diag(|w| + eta) (arXiv 2102.11600, equation 7)."""
    T = torch.diag(w.abs() + eta)
    return rho * (T @ T @ g) / (T @ g).square().sum().sqrt()


def trajectory(
    L: Callable[[Tensor], Tensor],
    w: Tensor,
    perturbation: Callable[[Tensor, Tensor], Tensor],
    base: Callable[[list[Tensor]], Optimizer],
    steps: int,
    interval: int = 1,
) -> Tensor:
    """Return w after some steps, each: g at w; e(w, g); g_s at w + e; the base steps from w with g_s."""
    w = w.detach().clone().requires_grad_()
    optimizer = base([w])
    for t in range(steps):
        _, g = loss_and_gradient(L, w)
        if t % interval == 0:
            _, g = loss_and_gradient(L, w.detach() + perturbation(w.detach(), g))
        w.grad = g
        optimizer.step()
    return w.detach()
