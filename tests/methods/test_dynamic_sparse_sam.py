"""SSAM-D against its slow reference, and the exchange of its coordinates. test_sparse_sam.py has more of its masks."""

import math
from types import MappingProxyType

import pytest
import torch
from masks_of_rules import gradients, mask, point
from named_methods import passes_per_step
from perturbations import PerturbationWithMemoryTests
from slow_reference import Tensors, as_tensors, generator, sam_numbers

from steppe.methods.dynamic_sparse_sam import DynamicSparse
from steppe.methods.rwp import GaussianNoise
from steppe.rules.l2 import L2
from steppe.rules.linf import LInf


class DynamicSparseE:
    """e = m * rho g / |g|; the flattest of m leave it, others are added at random (arXiv 2210.05177)."""

    def __init__(self, total_steps: int, sparsity: float, drop: float, interval: int, seed: int) -> None:
        self.total_steps, self.sparsity, self.drop = total_steps, sparsity, drop
        self.interval, self.seed, self.t = interval, seed, 0
        self.m: set[int] = set()

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        gradient = [abs(x) for part in g for x in part.reshape(-1).tolist()]
        chance = [
            x
            for i, part in enumerate(g)
            for x in torch.rand(part.numel(), generator=generator("DynamicSparse", self.seed, self.t, i)).tolist()
        ]
        everything = set(range(len(gradient)))
        kept = round((1 - self.sparsity) * len(gradient))
        if self.t == 0:
            self.m = set(sorted(everything, key=lambda i: -chance[i])[:kept])
        elif self.t % self.interval == 0:
            share = self.drop / 2 * (1 + math.cos(math.pi * min(self.t, self.total_steps) / self.total_steps))
            number = min(int(share * kept), len(everything) - kept)
            flattest = sorted(self.m, key=lambda i: gradient[i])[:number]
            grown = sorted(everything - self.m, key=lambda i: -chance[i])[:number]
            self.m = (self.m - set(flattest)) | set(grown)
        self.t += 1
        return as_tensors([x if i in self.m else 0.0 for i, x in enumerate(sam_numbers(g, rho))], g)


class TestDynamicSparse(PerturbationWithMemoryTests):
    cases = MappingProxyType(
        {
            "sparsity 0.5": (
                DynamicSparse(L2(), total_steps=20, interval=5),
                lambda: DynamicSparseE(20, 0.5, 0.5, 5, 0),
            ),
            "sparsity 0.8": (
                DynamicSparse(L2(), total_steps=12, sparsity=0.8, drop=0.9, interval=2, seed=3),
                lambda: DynamicSparseE(12, 0.8, 0.9, 2, 3),
            ),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("dynamic_sparse_sam") == 2.0


@pytest.mark.parametrize("step", [0, 25, 50, 100, 250])
def test_flattest_coordinates_are_exchanged_for_new_ones(step):
    memory, w = {}, gradients()
    rule = DynamicSparse(LInf(), total_steps=100, drop=0.4, interval=1)
    before = mask(rule, point(gradients(1), 1, memory, w))
    g = gradients(2)
    after = mask(rule, point(g, step, memory, w))
    size = torch.cat([part.reshape(-1).abs() for part in g])
    number = int(0.4 * (1 + math.cos(math.pi * min(step, 100) / 100)) / 2 * 337)
    dropped, grown = before & ~after, after & ~before
    assert dropped.sum() == grown.sum() == number
    if number:
        assert size[dropped].max() < size[before & after].min()


def test_another_seed_draws_another_mask():
    masks = [mask(DynamicSparse(LInf(), 10, seed=seed), point(gradients())) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert 200 < (masks[0] ^ masks[2]).sum() < 500
    parts = DynamicSparse(LInf(), 10)(point(gradients())).direction
    assert (parts[0] != 0).double().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicSparse(GaussianNoise(), 10), "needs no gradient at w"),
        (lambda: DynamicSparse(L2(), 10, drop=1.5), "drop must be between 0 and 1, got 1.5"),
        (lambda: DynamicSparse(L2(), 0), "total_steps must be 1 or more, got 0"),
    ],
)
def test_hyperparameter_or_rule_that_does_not_fit_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
