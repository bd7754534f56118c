"""SAM against its slow reference, and the mutants of the engine that this comparison must kill."""

import functools

import pytest
import torch

import steppe
from checks import build_with_memory, matches_reference, restores_exactly, resumes
from steppe._engine import displacement, engine, wrapper
from steppe._engine import state_dict as checkpoints
from steppe.rules import ScaledDirection
from support import BASES, DRIVES


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", BASES)
def test_sam_matches_its_slow_reference(base, drive):
    matches_reference("sam", base, drive)


def test_length_of_e_is_rho():
    w = torch.nn.Parameter(torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64))
    g = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    direction, scale = steppe.L2()(steppe.Point([w], [g], [0.5], [{}], 0))
    assert float((0.5 * scale * direction[0]).norm()) == pytest.approx(0.5, rel=1e-12)


# Each mutant breaks the package in one place, and a check must fail.


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("rule", ["sam", "asam"])
@pytest.mark.parametrize("factor", [0.0, -1.0, 0.999])
def test_mutant_wrong_length_or_sign_of_e_is_killed(monkeypatch, rule, drive, factor):
    perturb = engine.Engine.perturb

    def mutant(self, point, perturbation):
        e = perturbation(point)
        perturb(self, point, lambda _: ScaledDirection(e.direction, e.scale * factor))

    monkeypatch.setattr(engine.Engine, "perturb", mutant)
    with pytest.raises(AssertionError):
        matches_reference(rule, "sgd", drive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drive", DRIVES)
def test_mutant_restore_by_subtraction_is_killed(monkeypatch, drive, dtype):
    class BySubtraction(displacement.Displacement):
        def displace(self, weights, alpha, direction, **options):
            super().displace(weights, alpha, direction, **options)
            self._undo = [*getattr(self, "_undo", []), (list(weights), -alpha, [d.clone() for d in direction])]

        @torch.no_grad()
        def restore(self):
            for weights, alpha, direction in self.__dict__.pop("_undo", []):
                displacement.add_scaled_(weights, alpha, direction)
            self._displaced.clear()

    monkeypatch.setattr(engine, "Displacement", BySubtraction)
    with pytest.raises(AssertionError):
        restores_exactly(drive, dtype)


def test_mutant_no_restore_is_killed(monkeypatch):
    monkeypatch.setattr(displacement.Displacement, "restore", lambda self: self._displaced.clear())
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

    monkeypatch.setattr(wrapper, "pack", lossy)
    with pytest.raises(AssertionError):
        resumes(functools.partial(build_with_memory, "momentum"), "closure")
