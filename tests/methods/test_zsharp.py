"""ZSharp against its slow reference."""

from functools import partial
from types import MappingProxyType

import pytest
import torch
from named_methods import passes_per_step
from perturbations import RHO, PerturbationTests, assert_length_is_rho, e, point
from slow_reference import Tensors, along

from steppe.methods.zsharp import ZScore


def zscore_e(g: Tensors, rho: float, w: Tensors | None = None, Q_p: float = 0.95) -> Tensors:
    """e = rho g~ / |g~|, where g~ keeps the entries whose |z| is above its percentile Q_p (arXiv 2505.02369)."""
    kept = []
    for part in g:
        if part.ndim <= 1:
            kept.append(part)
            continue
        z = (part - part.mean()) / part.std()
        mask = z.abs() > torch.quantile(z.abs(), Q_p)
        kept.append(part * mask)
    return along(kept, rho)


class TestZScore(PerturbationTests):
    cases = MappingProxyType(
        {
            "default": (ZScore(), lambda: zscore_e),
            "percentile 0.5": (ZScore(percentile=0.5), lambda: partial(zscore_e, Q_p=0.5)),
            "percentile 0": (ZScore(percentile=0.0), lambda: partial(zscore_e, Q_p=0.0)),
        }
    )

    def test_length_of_e_is_rho(self, case):
        assert_length_is_rho(self.rule(case))


def test_step_costs_two_passes():
    assert passes_per_step("zsharp") == 2.0


def test_filter_agrees_with_torch_quantile_for_any_size_and_percentile():
    torch.manual_seed(0)
    for n in (3, 4, 20, 21, 100, 101, 1001):
        for percentile in (0.0, 0.25, 0.5, 0.7, 0.95, 0.99):
            g = [torch.randn(1, n, dtype=torch.float64)]
            torch.testing.assert_close(e(ZScore(percentile), point(g)), zscore_e(g, RHO, Q_p=percentile))


def test_filter_keeps_the_top_five_percent_of_each_matrix_and_all_of_a_vector():
    torch.manual_seed(0)
    g = [torch.randn(20, 50), 1e-6 * torch.randn(20, 50), torch.randn(7)]
    assert [int((part != 0).sum()) for part in e(ZScore(), point(g))] == [50, 50, 7]


def test_filter_keeps_a_matrix_in_which_only_zeros_would_be_left():
    constant, one_zero = torch.full((2, 2), 3.0), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    direction, _ = ZScore(0.5)(point([constant, one_zero, torch.empty(0, 3)]))
    assert torch.equal(direction[0], constant)
    assert torch.equal(direction[1], one_zero)


@pytest.mark.parametrize(
    ("percentile", "message"),
    [
        (95, "percentile must be at least 0 and less than 1, got 95"),
        (-0.1, "percentile must be"),
        (float("nan"), "percentile must be"),
    ],
)
def test_percentile_out_of_range_is_an_error(percentile, message):
    with pytest.raises(ValueError, match=message):
        ZScore(percentile)
