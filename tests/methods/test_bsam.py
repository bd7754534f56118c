"""bSAM: against its slow reference with the same noise; its noise, special cases and arguments."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from own_step_problem import Loss, assert_close, gradient, loss, start, trained
from torch import Tensor

import steppe
from checks import split
from steppe._tensors import random as random_tensors
from steppe.methods.bsam import BSAM
from support import batch, bits, by_closure, model_bits, net, plain, saved_and_loaded, train


def bsam(L: Loss, w: Tensor, steps: int, noise: Callable[[int], Tensor], *, alpha, N, rho, beta1, beta2, delta, gamma):
    """arXiv 2210.01620, algorithm 1."""
    omega, s, g_m = w.detach().clone(), torch.ones_like(w), torch.zeros_like(w)
    for t in range(steps):
        theta = omega + noise(t) * (1 / (N * s)).sqrt()
        g = gradient(L, theta, t)
        epsilon = rho * g / s
        g_epsilon = gradient(L, omega + epsilon, t)
        g_m = beta1 * g_m + (1 - beta1) * (g_epsilon + delta * omega)
        s = beta2 * s + (1 - beta2) * (s.sqrt() * g.abs() + delta + gamma)
        omega = omega - alpha * g_m / s
    return omega


ARGUMENTS = {"lr": 0.02, "n_data": 50, "rho": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.01, "damping": 0.2}
PAPER_ARGUMENTS = {"alpha": 0.02, "N": 50, "rho": 0.1, "beta1": 0.8, "beta2": 0.9, "delta": 0.01, "gamma": 0.2}


def noise(t):
    drawn = random_tensors.normal("BSAM/0", 4, t, split(start()))
    return torch.cat([n.reshape(-1) for n in drawn])


def reference(noise=noise, **changes):
    return bsam(loss, start(), 20, noise, **(PAPER_ARGUMENTS | changes))


@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_bsam_matches_its_slow_reference(drive):
    assert_close(trained(lambda ps: BSAM(ps, seed=4, **ARGUMENTS), drive), reference())


@pytest.mark.parametrize("changed", PAPER_ARGUMENTS)
def test_mutant_without_noise_or_with_another_hyperparameter_is_killed(changed):
    ours = trained(lambda ps: BSAM(ps, seed=4, **ARGUMENTS))
    with pytest.raises(AssertionError):
        assert_close(ours, reference(**{changed: 1.001 * PAPER_ARGUMENTS[changed]}))
    with pytest.raises(AssertionError):
        assert_close(ours, reference(lambda t: 0 * noise(t)))
    with pytest.raises(AssertionError):
        assert_close(ours, reference(rho=0.0))


def test_noise_has_the_variance_of_the_posterior_and_depends_on_seed_and_step_only():
    w = torch.nn.Parameter(torch.full((20000,), 5.0))
    visited = []

    def sampled(seed):
        optimizer = BSAM([w], 0.0, n_data=25, scale=4.0, seed=seed)
        for sam_pass in optimizer.passes():
            with sam_pass:
                visited.append(w.detach().clone())
                w.sum().backward()
        optimizer.step()
        return optimizer

    before = torch.get_rng_state()
    again = sampled(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (w == 5).all()
    n = visited[0] - 5
    assert n.mean().item() == pytest.approx(0, abs=3e-3)
    assert n.std().item() == pytest.approx((25 * 4.0) ** -0.5, rel=0.03)
    torch.testing.assert_close(visited[1], torch.full_like(w, 5 + 0.01 / 4))
    torch.manual_seed(123)
    sampled(0)
    sampled(1)
    assert torch.equal(visited[2], visited[0])
    assert not torch.equal(visited[4], visited[0])
    for sam_pass in again.passes():
        with sam_pass:
            visited.append(w.detach().clone())
            w.sum().backward()
    assert abs(torch.corrcoef(torch.stack([visited[6], visited[0]]))[0, 1]) < 0.05


def test_loss_is_that_at_the_sample_and_the_scale_grows_with_the_gradient():
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = BSAM([w], lr=0.0, n_data=10, betas=(0.9, 0.5), weight_decay=0.0, damping=0.0)
    got = by_closure(optimizer, lambda: (w * torch.tensor([4.0, 0.0])).sum())
    n = random_tensors.normal("BSAM/0", 0, 0, [w])[0] / 10**0.5
    assert got.item() == pytest.approx(4 * (1 + n[0].item()))
    torch.testing.assert_close(optimizer.state[w]["scale"], torch.tensor([0.5 + 0.5 * 4, 0.5]))


def test_each_accumulated_micro_batch_has_its_own_noise_and_perturbation():
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = BSAM([w], lr=0.1, n_data=10, rho=0.2, betas=(0.0, 0.5), weight_decay=0.0, damping=0.1)
    for i, a in enumerate((1.0, -2.0)):
        for sam_pass in optimizer.passes(accumulate=i > 0, loss_weight=0.5):
            with sam_pass:
                (a * w**3 / 2).sum().backward()
    optimizer.step()
    g_e, size = 0.0, 0.0
    for i, a in enumerate((1.0, -2.0)):  # as in the authors' code: g is that of the micro-batch's own mean loss
        n = random_tensors.normal(f"BSAM/{i}", 0, 0, [w])[0].item() / 10**0.5
        g = 3 * a * (1 + n) ** 2
        size += abs(g) / 2
        g_e += 3 * a * (1 + 0.2 * g) ** 2 / 2
    s = 0.5 + 0.5 * (size + 0.1)
    assert optimizer.state[w]["scale"].item() == pytest.approx(s, rel=1e-12)
    assert w.item() == pytest.approx(1 - 0.1 * g_e / s, rel=1e-12)


def test_groups_have_their_own_hyperparameters():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [a], "lr": 0.0}, {"params": [b], "scale": 3.0, "weight_decay": 0.0, "sam_rho": 0.7}]
    optimizer = BSAM(groups, lr=0.1, n_data=10)
    assert optimizer.state[b]["scale"].item() == 3.0
    assert optimizer.param_groups[1]["sam_rho"] == 0.7
    by_closure(optimizer, lambda: (a * b).sum())
    assert a.item() == 1.0
    assert b.item() != 1.0


def test_without_noise_perturbation_prior_and_curvature_bsam_is_sgd_with_momentum():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    neutral = {"n_data": 1e30, "rho": 0.0, "betas": (0.9, 1 - 1e-12), "weight_decay": 0.0, "damping": 0.0}
    train(model, BSAM(model.parameters(), 0.1, **neutral, model=model), by_closure, 4)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, dampening=0.9)
    for p in twin.parameters():
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)  # else the first gradient counts in full
    train(twin, sgd, plain, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_accelerator_skips_a_step_that_is_not_finite_without_changing_weights_or_state():
    model = net(dropout=0.0)
    optimizer = BSAM(model.parameters(), 0.1, n_data=100, model=model)
    train(model, optimizer, by_closure, 2)
    before = bits(model.parameters()), bits(t for s in optimizer.state.values() for t in s.values())
    x, y = batch()
    for sam_pass in optimizer.passes():
        with sam_pass:
            (F.cross_entropy(model(x), y) * (float("nan") if sam_pass.is_perturbed else 1)).backward()
    gradients = optimizer._engine.gradients
    gradients._step_on_device(torch.tensor(False), gradients.views(gradients.parameters()))  # as on an accelerator
    assert (bits(model.parameters()), bits(t for s in optimizer.state.values() for t in s.values())) == before


def test_checkpoint_loaded_into_the_base_restores_the_whole_state():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    one, two = (BSAM(m.parameters(), 0.1, n_data=100, model=m) for m in (model, twin))
    train(model, one, by_closure, 2)
    twin.load_state_dict(model.state_dict())
    two.base.load_state_dict(copy.deepcopy(saved_and_loaded(one.state_dict())))  # and not by the wrapper
    train(model, one, by_closure, 2, start=2)
    train(twin, two, by_closure, 2, start=2)
    assert model_bits(twin) == model_bits(model)


@pytest.mark.parametrize(
    "wrong",
    [{"n_data": 0}, {"betas": (1.0, 0.9)}, {"weight_decay": -1.0}, {"damping": -0.1}, {"scale": 0.0}, {"lr": -1.0}],
)
def test_argument_out_of_range_is_an_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BSAM([torch.nn.Parameter(torch.ones(1))], **({"n_data": 10} | wrong))


def test_plain_step_uses_the_present_gradient():
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = BSAM([w], 0.1, n_data=10)
    w.grad = torch.ones(1)
    with pytest.warns(UserWarning, match="a plain step"):
        optimizer.step()
    assert w.item() < 1
    with pytest.raises(RuntimeError, match=r"give the closure to BSAM\.step"):
        optimizer.base.step(lambda: None)


@pytest.mark.parametrize(
    ("slot", "rule"),
    [("perturbation", steppe.L2()), ("combination", steppe.PenalizedNorm()), ("cadence", steppe.Periodic(2))],
)
def test_no_rule_can_be_assigned(slot, rule):
    optimizer = steppe.variants.bsam([torch.nn.Parameter(torch.ones(2))], n_data=10)
    with pytest.raises(TypeError, match=f"BSAM has a {slot} of its own"):
        setattr(optimizer, slot, rule)
