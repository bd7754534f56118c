"""PGN against its slow reference."""

from types import MappingProxyType

import pytest
from combinations import RHO, CombinationTests, Reference, assert_is_base, assert_is_sam
from named_methods import passes_per_step
from torch import Tensor

from steppe.methods.pgn import PenalizedNorm


def pgn(lambda_: float, r: float) -> Reference:
    """arXiv 2202.03599: L + lambda |g|, whose Hessian-vector product is a difference quotient over r."""

    def update(g: Tensor, g_r: Tensor | None, _: dict[str, Tensor]) -> Tensor:
        return g if g_r is None else g + lambda_ * (g_r - g) / r

    return update


class TestPenalizedNorm(CombinationTests):
    cases = MappingProxyType(
        {
            "interval 1": (PenalizedNorm(alpha=0.7), pgn(0.7 * RHO, RHO), 1),
            "interval 2": (PenalizedNorm(alpha=0.7), pgn(0.7 * RHO, RHO), 2),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("pgn") == 2.0


def test_alpha_one_is_sam():
    assert_is_sam(PenalizedNorm(1.0))


def test_alpha_zero_is_the_base():
    assert_is_base(PenalizedNorm(0.0))


def test_infinite_alpha_is_an_error():
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        PenalizedNorm(float("inf"))
