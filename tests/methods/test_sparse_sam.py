"""SSAM-F against its slow reference, and the masks that it keeps. SSAM-D has the same tests of its masks."""

from itertools import pairwise
from types import MappingProxyType

import pytest
import torch
from masks_of_rules import gradients, mask, point
from named_methods import passes_per_step
from perturbations import PerturbationWithMemoryTests, assert_equals_sam
from slow_reference import Tensors, as_tensors, sam_numbers
from torch import nn

import steppe
from steppe import SAM
from steppe.methods.dynamic_sparse_sam import DynamicSparse
from steppe.methods.msam import Momentum
from steppe.methods.sparse_sam import Sparse
from steppe.rules.l2 import L2
from steppe.rules.linf import LInf
from support import DRIVES, by_closure, net, saved_and_loaded, train

DYNAMIC = DynamicSparse(LInf(), total_steps=100, interval=5)


class SparseE:
    """e = m * rho g / |g|, m the largest of the squared gradients, chosen after each interval (arXiv 2210.05177)."""

    def __init__(self, sparsity: float, interval: int) -> None:
        self.sparsity, self.interval, self.t = sparsity, interval, 0
        self.m: set[int] = set()

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        fisher = [x * x for part in g for x in part.reshape(-1).tolist()]
        if self.t % self.interval == 0:
            order = sorted(range(len(fisher)), key=lambda i: -fisher[i])
            self.m = set(order[: round((1 - self.sparsity) * len(fisher))])
        self.t += 1
        return as_tensors([x if i in self.m else 0.0 for i, x in enumerate(sam_numbers(g, rho))], g)


class TestSparse(PerturbationWithMemoryTests):
    cases = MappingProxyType(
        {
            "sparsity 0.5": (Sparse(L2(), sparsity=0.5, interval=5), lambda: SparseE(0.5, 5)),
            "sparsity 0.9": (Sparse(L2(), sparsity=0.9, interval=7), lambda: SparseE(0.9, 7)),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("sparse_sam") == 2.0


def test_sparsity_zero_is_sam():
    assert_equals_sam(Sparse(L2(), sparsity=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 675), (0.5, 337), (0.9, 67), (0.98, 13), (0.9999, 1)])
@pytest.mark.parametrize("make", [Sparse, lambda rule, s: DynamicSparse(rule, 100, s, interval=1)])
def test_number_of_kept_coordinates_is_exact_at_every_step(make, sparsity, kept, dtype):
    """In bfloat16 many gradients are equal."""
    rule, memory, w = make(LInf(), sparsity), {}, gradients()
    for step in range(12):
        got = mask(rule, point(gradients(step, dtype), step, memory, w))
        assert abs(int(got.sum()) - kept) <= 1
        assert int(got.sum()) == max(1, 675 - round(675 * sparsity))


def test_constant_gradient_has_no_more_than_its_share_of_coordinates():
    assert int(mask(Sparse(LInf(), 0.5), point([torch.ones(10)])).sum()) == 5


def test_largest_gradients_of_all_parameters_together_are_kept():
    g = [torch.tensor([5.0, -4.0]), torch.tensor([[0.1, -3.0]]), torch.tensor(2.0), torch.tensor([-6.0])]
    direction, _ = Sparse(L2(), sparsity=0.5)(point(g))
    assert [d.tolist() for d in direction] == [[5.0, -4.0], [[0.0, 0.0]], 0.0, [-6.0]]


def test_mask_is_applied_after_the_normalization():
    g = gradients()
    direction, scale = Sparse(L2(), sparsity=0.5)(point(g))
    e = torch.cat([(scale * d).reshape(-1) for d in direction])
    line = torch.cat([part.reshape(-1) for part in g])
    torch.testing.assert_close(e.float(), torch.where(e != 0, line / line.norm(), 0.0))
    assert e.norm() < 0.999


@pytest.mark.parametrize("rule", [Sparse(LInf(), interval=5), DYNAMIC], ids=["sparse", "dynamic"])
def test_masks_change_only_after_each_interval(rule):
    memory, w = {}, gradients()
    masks = [mask(rule, point(gradients(step), step, memory, w)) for step in range(3, 17)]
    changes = [step for step, (a, b) in enumerate(pairwise(masks), 4) if not torch.equal(a, b)]
    assert changes == [5, 10, 15]


def test_masks_change_once_in_a_step_of_several_ascent_steps():
    w = [nn.Parameter(part) for part in gradients()]
    for inner in (Sparse(LInf(), interval=1), DynamicSparse(LInf(), total_steps=100, interval=1)):
        rule = steppe.AscentSteps(inner, ascent_steps=3)
        optimizer = SAM(torch.optim.SGD(w, lr=0.0), rho=1e-3, perturbation=rule)
        points = []

        def loss(points=points):
            line = torch.cat([p.reshape(-1) for p in w])
            points.append(line.detach().clone())
            return line @ torch.cat([part.reshape(-1) for part in gradients(len(points))])

        for _ in range(3):
            points.clear()
            by_closure(optimizer, loss)
            moved = [perturbed != points[0] for perturbed in points[1:]]
            assert moved[0].any()
            assert not (moved[2] & ~moved[0]).any()


@pytest.mark.parametrize("rule", [Sparse(L2(), interval=5), DYNAMIC], ids=["sparse", "dynamic"])
@pytest.mark.parametrize("drive", DRIVES)
def test_memory_is_one_bool_per_coordinate_before_and_after_a_checkpoint(rule, drive):
    def memory_of(optimizer):
        return {p: own["mask"] for p, own in optimizer._engine.memory[type(rule).__name__].items()}

    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model, perturbation=rule)
    train(model, optimizer, DRIVES[drive], 3)
    masks = memory_of(optimizer)
    assert all(m.dtype == torch.bool and m.shape == p.shape for p, m in masks.items())
    assert all(m.untyped_storage().nbytes() == m.numel() for m in masks.values())
    state = saved_and_loaded(optimizer.state_dict())
    fresh = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model, perturbation=rule)
    fresh.load_state_dict(state)
    train(model, fresh, DRIVES[drive], 1, start=3)
    assert all(
        torch.equal(memory_of(fresh)[p], m) and memory_of(fresh)[p].dtype == torch.bool for p, m in masks.items()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparse(L2(), sparsity=1.0), "sparsity must be at least 0 and less than 1, got 1.0"),
        (lambda: Sparse(L2(), sparsity=-0.1), "sparsity must be"),
        (lambda: Sparse(L2(), interval=0), "interval must be 1 or more, got 0"),
        (lambda: Sparse(Momentum()), "needs no gradient at w, so there is none to choose a mask by"),
        (lambda: Sparse(steppe.AscentSteps(L2(), ascent_steps=2)), r"Steps\(Sparse\(L2\(\)\)\)"),
    ],
)
def test_hyperparameter_or_rule_that_does_not_fit_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
