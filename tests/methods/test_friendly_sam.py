"""F-SAM against its slow reference and the authors' code."""

from types import MappingProxyType

import pytest
import torch
from named_methods import passes_per_step
from perturbations import RHO, RunningMeanTests, assert_equals_sam, e, gradients, point, start
from slow_reference import Tensors, along

from steppe.methods.friendly_sam import Friendly


class FriendlyE:
    """m_t = lambda m_{t-1} + (1 - lambda) g_t, m_{-1} = 0; e = rho d / |d|, d = g_t - sigma m_t (arXiv 2403.12350)."""

    def __init__(self, sigma: float = 1.0, lmbda: float = 0.9) -> None:
        self.sigma, self.lmbda = sigma, lmbda
        self.m: Tensors | None = None

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        before = [0 * part for part in g] if self.m is None else self.m
        self.m = [self.lmbda * m + (1 - self.lmbda) * part for m, part in zip(before, g, strict=True)]
        return along([part - self.sigma * m for part, m in zip(g, self.m, strict=True)], rho)


class FriendlyCodeE:
    """The same in the authors' code: d = g_t - sigma m_{t-1}, from m_0 = g_0 and d_0 = g_0."""

    def __init__(self, m: Tensors, sigma: float = 1.0, lmbda: float = 0.9) -> None:
        self.m, self.sigma, self.lmbda = m, sigma, lmbda

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        d = [part - self.sigma * m for part, m in zip(g, self.m, strict=True)]
        self.m = [self.lmbda * m + (1 - self.lmbda) * part for m, part in zip(self.m, g, strict=True)]
        return along(d, rho)


class TestFriendly(RunningMeanTests):
    cases = MappingProxyType(
        {
            "default": (Friendly(), FriendlyE),
            "sigma 0.5": (Friendly(sigma=0.5, lmbda=0.6), lambda: FriendlyE(0.5, 0.6)),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("friendly_sam") == 2.0


def test_sigma_one_gives_the_e_of_the_authors_code_for_the_same_mean():
    rule, memory, w = Friendly(), {}, start()
    torch.manual_seed(0)
    first = gradients()
    rule(point(first, memory, w))
    code = FriendlyCodeE([0.1 * part for part in first])  # the code itself starts from m = first
    for _ in range(5):
        g = gradients()
        torch.testing.assert_close(e(rule, point(g, memory, w)), code(g, RHO), rtol=1e-12, atol=1e-12)


def test_sigma_zero_is_sam():
    assert_equals_sam(Friendly(sigma=0.0))


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"sigma": -1.0}, "sigma must be finite and not negative, got -1.0"),
        ({"sigma": float("inf")}, "sigma must be"),
        ({"lmbda": 1.0}, "lmbda must be more than 0 and less than 1, got 1.0"),
        ({"lmbda": 0.0}, "lmbda must be"),
    ],
)
def test_hyperparameter_out_of_range_is_an_error(hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        Friendly(**hyperparameters)
