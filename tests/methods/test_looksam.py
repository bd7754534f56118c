"""LookSAM against its slow reference, and what it stores between perturbed steps."""

import functools
from types import MappingProxyType

import pytest
import torch
from combinations import (
    CALM,
    RHO,
    CombinationTests,
    Reference,
    assert_is_sam,
    norm,
    trained,
    trajectory,
    unperturbed_and_perturbed,
)
from named_methods import passes_per_step
from torch import Tensor

import steppe
from checks import bumpy, resumes
from live_memory import LiveMemory
from steppe._engine import wrapper
from steppe._engine.state_dict import pack
from steppe._tensors import in_place, reductions
from steppe.methods.late_sam import LatePhase
from steppe.methods.looksam import GradientReuse
from steppe.rules import Cadence
from steppe.rules.ops import dot
from steppe.rules.periodic import Periodic
from support import BASES, DRIVES


def looksam(alpha: float) -> Reference:
    """arXiv 2203.02714: theta is the angle between g and g_s."""

    def update(g: Tensor, g_s: Tensor | None, memory: dict[str, Tensor]) -> Tensor:
        if g_s is not None:
            cos_theta = (g * g_s).sum() / (norm(g) * norm(g_s))
            memory["g_v"] = g_s - norm(g_s) * cos_theta * g / norm(g)
            return g_s
        if "g_v" not in memory:
            return g
        return g + alpha * norm(g) / norm(memory["g_v"]) * memory["g_v"]

    return update


class TestGradientReuse(CombinationTests):
    cases = MappingProxyType({"interval 3": (GradientReuse(alpha=0.7), looksam(0.7), 3)})
    interval = 2

    def test_mutant_wrong_cadence_is_killed(self):
        with pytest.raises(AssertionError):
            self.matches_reference("interval 3", "sgd", "closure", cadence=Periodic(4))


def test_interval_5_costs_1_2_passes():
    assert passes_per_step("looksam", interval=5) == 1.2


@pytest.mark.parametrize("drive", DRIVES)
def test_update_gradient_is_g_before_the_first_perturbed_step(drive):
    start, got = trained("adamw", drive, GradientReuse(0.7), LatePhase(0.5, 20))
    want = trajectory(bumpy, start, looksam(0.7), CALM["adamw"], 20, RHO, lambda t: t >= 10)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_alpha_zero_is_sam_at_perturbed_steps_only():
    assert_is_sam(GradientReuse(0.0), interval=2)


def test_reused_part_is_orthogonal_to_g_and_has_length_alpha_g():
    g, g_s = unperturbed_and_perturbed()
    weights = [torch.zeros_like(c) for c in g]
    point = steppe.Point(weights, g, [0.1] * 3, [{}] * 3, 0)
    rule = GradientReuse(0.5)
    assert rule(point, g_s) is g_s
    between = steppe.Point(weights, g_s, [0.1] * 3, [{}] * 3, 1, point.memory)
    reused = [u - p for u, p in zip(rule(between, None), g_s, strict=True)]
    assert float(dot(reused, g)) == pytest.approx(0, abs=1e-13)
    assert float(dot(reused, reused)) == pytest.approx(0.25 * float(dot(g_s, g_s)), rel=1e-12)


def build(cadence: Cadence, model: torch.nn.Module) -> steppe.SAM:
    rules = {"combination": GradientReuse(), "cadence": cadence}
    return steppe.SAM(BASES["adamw"](model.parameters()), rho=0.1, model=model, **rules)


@pytest.mark.parametrize("after", [3, 4, 5])
@pytest.mark.parametrize("drive", DRIVES)
def test_resumed_run_has_the_same_bits(after, drive):
    resumes(functools.partial(build, Periodic(3)), drive, after=after, steps=9)


@pytest.mark.parametrize("lost", ["memory", "step"])
def test_mutant_incomplete_checkpoint_is_killed(monkeypatch, lost):
    def lossy(base, memory, step):
        return pack(base, {} if lost == "memory" else memory, step * (lost != "step"))

    monkeypatch.setattr(wrapper, "pack", lossy)
    with pytest.raises(AssertionError):
        resumes(functools.partial(build, Periodic(3)), "closure", after=4, steps=9)


def test_gradient_that_is_not_finite_is_not_stored():
    w, g = torch.zeros(2), torch.tensor([1.0, 0.0])
    first = steppe.Point([w], [g], [0.1], [{}], 0)
    rule = GradientReuse(1.0)
    rule(first, [torch.tensor([1.0, 0.5])])
    for bad in (float("nan"), float("inf")):
        rule(steppe.Point([w], [g], [0.1], [{}], 1, first.memory), [torch.tensor([1.0, bad])])
        rule(steppe.Point([w], [g * bad], [0.1], [{}], 1, first.memory), [torch.tensor([1.0, 2.0])])
    (update,) = rule(steppe.Point([w], [g], [0.1], [{}], 2, first.memory), None)
    assert update.tolist() == [1.0, 1.0]


def test_perturbed_step_makes_no_further_copy_of_the_gradients(monkeypatch):
    monkeypatch.setattr(in_place, "_PIECE", 100)
    monkeypatch.setattr(reductions, "_CHUNK", 100)
    w, g, g_s = ([torch.randn(100, 100)] for _ in range(3))
    with LiveMemory() as memory:
        first = steppe.Point(w, g, [0.1], [{}], 0)
        GradientReuse()(first, g_s)
        GradientReuse()(steppe.Point(w, g, [0.1], [{}], 1, first.memory), g_s)
    assert memory.peak < 4.1 * w[0].nbytes, "w, g, g_s and g_v"


def test_parameter_that_joins_between_perturbed_steps_is_updated_with_g():
    a, b = torch.zeros(1), torch.zeros(1)
    first = steppe.Point([a], [torch.ones(1)], [0.1], [{}], 0)
    GradientReuse()(first, [torch.ones(1) * 2])
    both = steppe.Point([a, b], [torch.ones(1), torch.ones(1)], [0.1] * 2, [{}] * 2, 1, first.memory)
    assert GradientReuse()(both, None)[1].tolist() == [1.0]


def test_negative_alpha_is_an_error():
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        GradientReuse(-1.0)
