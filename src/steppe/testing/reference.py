"""Compare a rule with a slow reference, and count the passes of a step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from steppe.sam import SAM
from steppe.testing._problems import Make, bumpy_loss, closure_of, count_passes, expect


def passes_per_step(make: Make, steps: int = 60) -> float:
    """Return the average number of forward and backward passes over the batch in a step.

    Example:
        >>> import steppe
        >>> def looksam(model):
        ...     return steppe.variants.looksam(torch.optim.SGD(model.parameters(), lr=0.1), interval=5, model=model)
        >>> passes_per_step(looksam)
        1.2
    """
    counts = list(count_passes(make, steps))
    return sum(counts) / len(counts)


def matches_reference(
    make: Callable[[list[nn.Parameter]], SAM],
    perturb: Callable[[Tensor, Tensor], Tensor],
    combine: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    *,
    is_perturbed: Callable[[int], bool] = lambda step: True,
    steps: int = 20,
    tolerance: float = 1e-12,
) -> None:
    """Compare a trajectory in float64 with a slow reference, written in the paper's notation on one flat vector.

    Args:
        make: Builds the optimizer around a list of parameters; its base is built alike around the reference's vector.
        perturb: (w, g) -> e, flat; called in the order of the steps, so that it may keep a memory of its own.
        combine: (g, g_s) -> update gradient, with g_s = None at a step without perturbation; by default g_s, or g.
        is_perturbed: Step -> True if the reference perturbs at this step.
        steps: The number of steps that must agree.
        tolerance: Relative and absolute tolerance of the weights after each step.

    Raises:
        AssertionError: The trajectories differ, or the reference has e = 0, so that the comparison could not fail.

    Example:
        >>> import steppe
        >>> def make(parameters):
        ...     return steppe.SAM(torch.optim.SGD(parameters, lr=0.03, momentum=0.9), rho=0.3)
        >>> matches_reference(make, perturb=lambda w, g: 0.3 * g / g.norm())
    """
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(10, generator=generator, dtype=torch.float64)
    parts = [nn.Parameter(part.clone()) for part in start.tensor_split((6, 9))]
    parts = [nn.Parameter(p.detach().reshape(s)) for p, s in zip(parts, [(2, 3), (3,), ()], strict=True)]
    optimizer = make(parts)
    flat = start.clone().requires_grad_()
    base = make([flat]).base  # type: ignore[list-item]
    e = torch.zeros_like(start)
    for step in range(steps):
        w = flat.detach()
        (g,) = torch.autograd.grad(bumpy_loss(flat), flat)
        g_s = None
        if is_perturbed(step):
            e = perturb(w, g)
            perturbed = (w + e).requires_grad_()
            (g_s,) = torch.autograd.grad(bumpy_loss(perturbed), perturbed)
        flat.grad = (g if g_s is None else g_s) if combine is None else combine(g, g_s)
        base.step()
        optimizer.step(closure_of(optimizer, lambda: bumpy_loss(torch.cat([p.reshape(-1) for p in parts]))))
        got = torch.cat([p.detach().reshape(-1) for p in parts])
        torch.testing.assert_close(got, flat.detach(), rtol=tolerance, atol=tolerance)
    expect(bool(e.norm() > 1e-3), "the reference has e = 0, so this comparison could not fail: give it a radius")
