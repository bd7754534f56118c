"""SAGM against its slow reference."""

from types import MappingProxyType

import pytest
import torch
from named_methods import passes_per_step
from own_step_problem import STABLE_BASES, assert_close, gradient, loss, start, trained
from perturbations import PerturbationTests, assert_equals_sam
from slow_reference import Tensors
from slow_reference import length as norm

from steppe import variants
from steppe.methods.sagm import GradientMatching


class MatchingE:
    """e = rho g / |g| - a g, with the paper's a = rho alpha (arXiv 2303.10353)."""

    def __init__(self, a: float) -> None:
        self.a = a

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        return [rho * part / norm(g) - self.a * part for part in g]


class TestGradientMatching(PerturbationTests):
    cases = MappingProxyType(
        {
            "default": (GradientMatching(), lambda: MatchingE(0.002)),
            "alpha 0.5": (GradientMatching(0.5), lambda: MatchingE(0.05)),
        }
    )


def sagm(base: str, rho: float, a: float) -> torch.Tensor:
    """w <- Base(w, (g + g_s) / 2), g_s at w + rho g / |g| - a g."""
    w = start().requires_grad_()
    optimizer = STABLE_BASES[base]([w])
    for t in range(20):
        g = gradient(loss, w, t)
        g_s = gradient(loss, w.detach() + rho * g / g.norm() - a * g, t)
        w.grad = 0.5 * g + 0.5 * g_s
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("base", STABLE_BASES)
def test_sagm_matches_its_slow_reference(base):
    ours = trained(lambda ps: variants.sagm(STABLE_BASES[base](ps), 0.1, alpha=0.5))
    assert_close(ours, sagm(base, 0.1, 0.05))
    for mutant in (sagm(base, 0.1, 0.0), sagm(base, 0.1, 0.05 * 0.999), sagm(base, 0.0, 0.0)):
        with pytest.raises(AssertionError):
            assert_close(ours, mutant)


def test_step_costs_two_passes():
    assert passes_per_step("sagm") == 2.0


def test_alpha_zero_perturbs_as_sam():
    assert_equals_sam(GradientMatching(0.0))


def test_negative_alpha_is_an_error():
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        GradientMatching(-0.1)
