"""SANER against its slow reference."""

from types import MappingProxyType

import pytest
import torch
from combinations import CombinationTests, Reference, assert_is_sam
from named_methods import passes_per_step
from torch import Tensor

import steppe
from steppe.methods.saner import DownWeighted


def saner(alpha: float) -> Reference:
    """r = g_s / g, m = 1[0 < r < 1], (1 - alpha m) g_s, entry by entry (arXiv 2411.17132)."""

    def update(g: Tensor, g_s: Tensor | None, memory: dict[str, Tensor]) -> Tensor:
        if g_s is None:
            return g
        r = g_s / g
        return (1 - alpha * ((r > 0) & (r < 1)).double()) * g_s

    return update


class TestDownWeighted(CombinationTests):
    cases = MappingProxyType(
        {
            "default": (DownWeighted(), saner(0.5), 1),
            "alpha 1": (DownWeighted(1.0), saner(1.0), 2),
        }
    )


def test_alpha_grows_linearly_in_the_warm_up():
    g, g_s = torch.ones(3), torch.tensor([0.5, 2.0, -0.5])
    factors = []
    for step in (0, 2, 4, 8):
        (update,) = DownWeighted(alpha=0.8, warmup_steps=4)(steppe.Point([g], [g], [0.1], [{}], step), [g_s])
        factors.append((update / g_s).tolist())
    assert torch.tensor(factors).allclose(torch.tensor([[1.0, 1, 1], [0.6, 1, 1], [0.2, 1, 1], [0.2, 1, 1]]))


def test_entries_that_are_zero_or_equal_are_not_reduced():
    g, g_s = torch.tensor([0.0, 1.0, 1.0, -1.0]), torch.tensor([0.5, 0.0, 1.0, -1.0])
    (update,) = DownWeighted()(steppe.Point([g], [g], [0.1], [{}], 0), [g_s])
    assert torch.equal(update, g_s)


def test_step_costs_two_passes():
    assert passes_per_step("saner") == 2.0


def test_alpha_zero_is_sam():
    assert_is_sam(DownWeighted(0.0))


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"alpha": -0.1}, "alpha must be between 0 and 1, got -0.1"),
        ({"alpha": 1.5}, "alpha must be between 0 and 1"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"warmup_steps": 0.25}, "warmup_steps must be a whole number"),
    ],
)
def test_hyperparameter_out_of_range_is_an_error(hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        DownWeighted(**hyperparameters)
