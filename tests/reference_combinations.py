"""GSAM, WSAM, PGN and LookSAM in the notation of their papers: slow, flat, float64, without a line of the package."""

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from reference import loss_and_gradient, sam_e

# A rule gets (g, g_s, memory) and returns what goes down; at a step that did not climb, g_s is None.
Rule = Callable[[Tensor, Tensor | None, dict[str, Tensor]], Tensor]


def norm(x: Tensor) -> Tensor:
    return x.square().sum().sqrt()


def gsam(alpha: float) -> Rule:
    """arXiv 2203.08065, algorithm 1: f is the loss, f_p the perturbed one."""

    def down(g_f: Tensor, g_fp: Tensor | None, _: dict[str, Tensor]) -> Tensor:
        if g_fp is None:
            return g_f
        unit = g_fp / norm(g_fp)
        parallel = (g_f * unit).sum() * unit
        orthogonal = g_f - parallel
        return g_fp - alpha * orthogonal

    return down


def wsam(gamma: float) -> Rule:
    """arXiv 2305.15817: L_WSAM = L + gamma / (1 - gamma) (L_SAM - L), written as a mean of the two gradients."""

    def down(g: Tensor, g_tilde: Tensor | None, _: dict[str, Tensor]) -> Tensor:
        if g_tilde is None:
            return g
        return (1 - 2 * gamma) / (1 - gamma) * g + gamma / (1 - gamma) * g_tilde

    return down


def pgn(lambda_: float, r: float) -> Rule:
    """arXiv 2202.03599: L + lambda |g|, whose Hessian-vector product is a difference quotient over r."""

    def down(g: Tensor, g_r: Tensor | None, _: dict[str, Tensor]) -> Tensor:
        return g if g_r is None else g + lambda_ * (g_r - g) / r

    return down


def looksam(alpha: float) -> Rule:
    """arXiv 2203.02714: theta is the angle between g and g_s."""

    def down(g: Tensor, g_s: Tensor | None, memory: dict[str, Tensor]) -> Tensor:
        if g_s is not None:
            cos_theta = (g * g_s).sum() / (norm(g) * norm(g_s))
            memory["g_v"] = g_s - norm(g_s) * cos_theta * g / norm(g)
            return g_s
        if "g_v" not in memory:
            return g
        return g + alpha * norm(g) / norm(memory["g_v"]) * memory["g_v"]

    return down


def trajectory(
    L: Callable[[Tensor], Tensor],
    w: Tensor,
    rule: Rule,
    base: Callable[[list[Tensor]], Optimizer],
    steps: int,
    rho: float,
    ascent_steps: Callable[[int], bool],
) -> Tensor:
    """w after so many steps: g at w, at some steps g_s at w + rho g / |g|; the base steps from w as the rule says."""
    w = w.detach().clone().requires_grad_()
    optimizer = base([w])
    memory: dict[str, Tensor] = {}
    for t in range(steps):
        _, g = loss_and_gradient(L, w)
        g_s = loss_and_gradient(L, w.detach() + sam_e(w.detach(), g, rho))[1] if ascent_steps(t) else None
        w.grad = rule(g, g_s, memory)
        optimizer.step()
    return w.detach()
