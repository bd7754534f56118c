"""The public checks of the contract: each mutant here breaks a statement, and its check must fail."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

import steppe
from steppe import testing
from steppe._tensors.reductions import norm, reciprocal


def wrap(model, *, rho=0.1, protect=True, **slots):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return steppe.SAM(base, rho, model=model if protect else None, **slots)


class MeanInTheRule(steppe.L2):
    """Perturb along a mean of the gradient that is kept in the rule, so that no checkpoint contains it."""

    def __init__(self):
        object.__setattr__(self, "mean", None)

    def __call__(self, point):
        mean = [g.clone() for g in point.gradients] if self.mean is None else self.mean
        mean = [m.lerp(g, 0.3) if m.shape == g.shape else g for m, g in zip(mean, point.gradients, strict=False)]
        object.__setattr__(self, "mean", mean)
        return steppe.ScaledDirection(mean)


SHARED = MeanInTheRule()


class ZeroByZero(steppe.L2):
    def __call__(self, point):
        return steppe.ScaledDirection([g / point.gradient_norm for g in point.gradients])


class ReadsNormOnHost(steppe.L2):
    def __call__(self, point):
        return steppe.ScaledDirection(point.gradients, 1 / max(point.gradient_norm.item(), 1e-12))


class ComplexDirection(steppe.L2):
    """Uses the complex parameters in place of their real views."""

    def __call__(self, point):
        along = [g * p.detach().abs() for g, p in zip(point.gradients, point.parameters, strict=True)]
        return steppe.ScaledDirection(along, reciprocal(norm(along)))


class Unnormalized(steppe.L2):
    """Perturbs along the gradient without a norm, but inherits scale_free = True."""

    def __call__(self, point):
        return steppe.ScaledDirection(point.gradients)


@dataclass(frozen=True)
class MeanUpdate:
    """Updates with a mean of g_s, which keeps a NaN forever."""

    needs_unperturbed_gradient: ClassVar[bool] = False

    def __call__(self, point, perturbed):
        memory = point.memory_of(self)
        for own, g in zip(memory, point.gradients if perturbed is None else perturbed, strict=True):
            own["mean"] = g.clone() if "mean" not in own else own["mean"].lerp(g, 0.5)
        return [own["mean"] for own in memory]


class ScaledUpdate(steppe.PerturbedGradient):
    """Changes the update gradient even at a step without perturbation."""

    def __call__(self, point, perturbed):
        return [g * 1.001 for g in (point.gradients if perturbed is None else perturbed)]


KILLED = {
    "a memory in the rule, and a checkpoint": (
        testing.resumes_to_the_bit,
        lambda m: wrap(m, perturbation=MeanInTheRule()),
    ),
    "a memory in the rule, and a neighbor": (testing.rules_are_stateless, lambda m: wrap(m, perturbation=SHARED)),
    "a direction of 0 / 0": (testing.gradients_may_be_absent_or_zero, lambda m: wrap(m, perturbation=ZeroByZero())),
    "other dropout masks": (testing.radius_zero_is_the_base, lambda m: wrap(m, replay_rng=False)),
    "statistics of the second pass": (testing.side_effects_are_those_of_one_pass, lambda m: wrap(m, protect=False)),
    "a remembered NaN": (testing.steps_that_are_not_finite_are_skipped, lambda m: wrap(m, combination=MeanUpdate())),
    "a value read on the host": (
        testing.no_value_is_read_on_the_host,
        lambda m: wrap(m, perturbation=ReadsNormOnHost()),
    ),
    "a complex direction": (testing.complex_parameters_work, lambda m: wrap(m, perturbation=ComplexDirection())),
    "a perturbation that depends on the scale": (
        testing.scale_free_rules_ignore_the_scale,
        lambda m: wrap(m, perturbation=Unnormalized()),
    ),
    "a step beside the base's": (testing.radius_zero_is_the_base, lambda m: wrap(m, combination=ScaledUpdate())),
}


@pytest.mark.filterwarnings("ignore:both passes changed the buffers")
@pytest.mark.parametrize("mutant", KILLED)
def test_mutant_rule_is_killed_by_its_check(mutant):
    check, make = KILLED[mutant]
    with pytest.raises((AssertionError, RuntimeError, DataDependentOutputException)):
        check(make)


def test_mutant_restore_by_subtraction_is_killed(monkeypatch):
    @torch.no_grad()
    def by_subtraction(self):
        for w, alpha, d in reversed(self._moves):
            w.sub_(alpha * d)
        self._moves.clear()

    def displace(self, weights, alpha, direction):
        self._moves = [(w, alpha, d) for w, d in zip(weights, direction, strict=True)]
        for w, _, d in self._moves:
            w.add_(alpha * d)

    monkeypatch.setattr("steppe._engine.displacement.Displacement.displace", displace)
    monkeypatch.setattr(
        "steppe._engine.displacement.Displacement.restore",
        lambda s: by_subtraction(s) if hasattr(s, "_moves") else None,
    )
    with pytest.raises(AssertionError, match=r"not at w after a pass|were not restored"):
        testing.weights_are_restored_exactly(wrap)


@pytest.mark.parametrize("check", testing.CHECKS)
def test_sam_passes_every_check(check):
    check(wrap)


def test_passes_per_step_are_counted():
    assert testing.passes_per_step(lambda m: wrap(m, cadence=steppe.Periodic(4)), 8) == 1.25


def make_optimizer(ps, rule=None, **slots):
    base = torch.optim.SGD(ps, lr=0.03, momentum=0.9)
    return steppe.SAM(base, 0.3, perturbation=rule or steppe.L2(), **slots)


@pytest.mark.parametrize("wrong", [-1.0, 0.0, 0.999])
def test_reference_kills_a_wrong_perturbation(wrong):
    testing.matches_reference(make_optimizer, lambda w, g: 0.3 * g / g.norm())
    with pytest.raises(AssertionError):
        testing.matches_reference(make_optimizer, lambda w, g: wrong * 0.3 * g / g.norm())


def test_reference_takes_a_combination_and_a_cadence():
    slots = {"combination": steppe.PenalizedNorm(0.7), "cadence": steppe.Periodic(2)}
    testing.matches_reference(
        lambda ps: make_optimizer(ps, **slots),
        lambda w, g: 0.3 * g / g.norm(),
        lambda g, g_s: g if g_s is None else 0.3 * g + 0.7 * g_s,
        is_perturbed=lambda step: step % 2 == 0,
    )


def test_reference_without_perturbation_is_an_error():
    def unperturbed(ps):
        return steppe.SAM(torch.optim.SGD(ps, lr=0.03), 0.0)

    with pytest.raises(AssertionError, match="could not fail"):
        testing.matches_reference(unperturbed, lambda w, g: 0.0 * g)
