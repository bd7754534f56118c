"""Each rule against its slow reference, and the mutants that these tests must kill."""

import functools

import pytest
import torch

import steppe
from checks import build, matches_reference, restores_exactly, resumes
from steppe import sam
from steppe._engine import displacement, engine
from steppe._engine import state_dict as checkpoints
from steppe.rules import ScaledDirection
from support import BASES, DRIVES


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", ["sam", "asam"])
def test_rule_matches_its_slow_reference(rule, base, drive):
    matches_reference(rule, base, drive)


@pytest.mark.parametrize("k", [2, 3])
def test_every_k_climbs_at_every_kth_step(k):
    matches_reference("sam", "momentum", "passes", every=k)
    with pytest.raises(AssertionError):  # and the reference knows the difference
        matches_reference_with_other_cadence(k)


def matches_reference_with_other_cadence(k):
    wrong = steppe.Periodic(k + 1)
    original, steppe.Periodic = steppe.Periodic, lambda _: wrong
    try:
        matches_reference("sam", "momentum", "passes", every=k)
    finally:
        steppe.Periodic = original


def test_radius_is_rho_in_the_norm_of_the_rule():
    w = torch.nn.Parameter(torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64))
    g = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    point = steppe.Point([w], [g], [0.5], [{}], 0)
    direction, scale = steppe.L2()(point)
    assert float((0.5 * scale * direction[0]).norm()) == pytest.approx(0.5, rel=1e-12)
    direction, scale = steppe.Adaptive(eta=0.1)(point)
    T = w.detach().abs() + 0.1
    assert float((0.5 * scale * direction[0] / T).norm()) == pytest.approx(0.5, rel=1e-12)


def test_rules_refuse_wrong_hyperparameters():
    with pytest.raises(ValueError, match="eta must be finite"):
        steppe.Adaptive(eta=-1.0)
    with pytest.raises(ValueError, match="k must be 1 or more"):
        steppe.Periodic(0)


# The mutants. Each breaks the package in one place, and a check must see it.


def climb_mutant(change):
    original = engine.Engine.move
    return lambda self, at, perturbation: original(self, at, lambda point: change(perturbation(point)))


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("rule", ["sam", "asam"])
@pytest.mark.parametrize("factor", [0.0, -1.0, 0.999])
def test_mutant_wrong_perturbation_is_killed(monkeypatch, rule, drive, factor):
    monkeypatch.setattr(engine.Engine, "move", climb_mutant(lambda e: ScaledDirection(e.direction, e.scale * factor)))
    with pytest.raises(AssertionError):
        matches_reference(rule, "sgd", drive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drive", DRIVES)
def test_mutant_restore_by_subtraction_is_killed(monkeypatch, drive, dtype):
    class BySubtraction(displacement.Displacement):
        def move(self, weights, alpha, direction):
            super().move(weights, alpha, direction)
            self._undo = [*getattr(self, "_undo", []), (list(weights), -alpha, [d.clone() for d in direction])]

        @torch.no_grad()
        def restore(self):
            for weights, alpha, direction in self.__dict__.pop("_undo", []):
                displacement.add_scaled_(weights, alpha, direction)
            self._away.clear()

    monkeypatch.setattr(engine, "Displacement", BySubtraction)
    with pytest.raises(AssertionError):
        restores_exactly(drive, dtype)


def test_mutant_no_restore_is_killed(monkeypatch):
    monkeypatch.setattr(displacement.Displacement, "restore", lambda self: self._away.clear())
    with pytest.raises(AssertionError):
        matches_reference("sam", "sgd", "closure")


@pytest.mark.parametrize("lost", ["momentum", "memory", "step"])
def test_mutant_incomplete_checkpoint_is_killed(monkeypatch, lost):
    def lossy(base, memory, step):
        packed = checkpoints.pack(base, {} if lost == "memory" else memory, 0 if lost == "step" else step)
        if lost == "momentum":
            packed["state"] = {
                i: {k: v for k, v in s.items() if k != "momentum_buffer"} for i, s in packed["state"].items()
            }
        return packed

    monkeypatch.setattr(sam, "pack", lossy)
    with pytest.raises(AssertionError):
        resumes(functools.partial(build, "momentum"), "closure")
