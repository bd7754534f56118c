"""SAM along the last gradient: against its slow reference, its first step, and what it keeps."""

import pytest
import torch
from named_methods import build, passes_per_step
from own_step_problem import STABLE_BASES, assert_close, gradient, loss, start, trained
from perturbations import assert_reads_no_value_on_the_host
from torch import Tensor

import steppe
from checks import resumes
from steppe import variants
from steppe._engine import wrapper
from steppe._engine.state_dict import pack
from steppe.methods.stale_sam import KeptGradient, StaleGradient
from support import DRIVES, by_closure, net, plain, train

RHO = 0.3


def stale(base: str, rho: float = RHO, delay: int = 1) -> Tensor:
    """g_t at w + rho g_(t-delay) / |g_(t-delay)|, and a step of the base from w with it."""
    w, kept = start().requires_grad_(), []
    optimizer = STABLE_BASES[base]([w])
    for t in range(20):
        g = kept[-delay] if len(kept) >= delay else torch.zeros_like(w)
        e = rho * g / g.norm() if g.any() else g
        w.grad = gradient(loss, w.detach() + e, t)
        kept.append(w.grad.clone())
        optimizer.step()
    return w.detach()


def ours(base: str, drive: str = "closure") -> Tensor:
    return trained(lambda ps: variants.stale_sam(STABLE_BASES[base](ps), RHO), drive)


@pytest.mark.parametrize("drive", [drive for drive in DRIVES if drive != "classic"])
@pytest.mark.parametrize("base", STABLE_BASES)
def test_stale_sam_matches_its_slow_reference(base, drive):
    assert_close(ours(base, drive), stale(base))


@pytest.mark.parametrize(("rho", "delay"), [(0.0, 1), (-RHO, 1), (0.999 * RHO, 1), (RHO, 2)])
def test_mutant_wrong_length_sign_or_delay_is_killed(rho, delay):
    with pytest.raises(AssertionError):
        assert_close(ours("sgd"), stale("sgd", rho, delay))


def test_step_costs_one_pass():
    assert passes_per_step("stale_sam") == 1.0


def test_first_step_is_that_of_the_base():
    model, other = net(dropout=0.0), net(dropout=0.0)
    sam = variants.stale_sam(torch.optim.SGD(model.parameters(), lr=0.1), RHO, model=model)
    train(model, sam, by_closure, 1)
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), plain, 1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:StaleGradient has no gradient:UserWarning")
def test_mutant_checkpoint_without_the_gradient_is_killed(monkeypatch):
    monkeypatch.setattr(wrapper, "pack", lambda base, memory, step: pack(base, {}, step))
    with pytest.raises(AssertionError):
        resumes(build("stale_sam"), "closure")


def test_gradient_that_is_not_finite_is_not_kept():
    w, g, memory = torch.zeros(2), torch.tensor([3.0, 4.0]), {}
    keep = KeptGradient()
    for part in (g, g * float("inf"), g * float("nan")):
        keep(steppe.Point([w], [], [0.1], [{}], 0, memory), [part])
        (direction,), scale = StaleGradient()(steppe.Point([w], [], [0.1], [{}], 1, memory))
        assert (scale * direction).tolist() == pytest.approx([0.6, 0.8])


def test_no_value_is_read_on_the_host(monkeypatch):
    assert_reads_no_value_on_the_host(StaleGradient(), monkeypatch, combination=KeptGradient())


def test_steps_without_the_combination_that_keeps_the_gradient_warn():
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = steppe.SAM(base, RHO, perturbation=StaleGradient(), model=model)
    train(model, sam, by_closure, 1)  # the first step has no gradient in any case
    with pytest.warns(UserWarning, match=r"this step is not perturbed.*combination=steppe.KeptGradient\(\)"):
        train(model, sam, by_closure, 1)
    sam.combination = KeptGradient()
    with pytest.warns(UserWarning, match="this step is not perturbed"):
        train(model, sam, by_closure, 1)
    train(model, sam, by_closure, 1)  # warnings are errors
