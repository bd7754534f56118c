"""bSAM: against its slow reference with the same noise, its noise, and its reductions."""

import pytest
import torch
import torch.nn.functional as F
from problems import agree, loss, start, through_a_file, trained
from reference_methods import bsam

from checks import split
from steppe._tensors import random as random_tensors
from steppe.methods.bsam import BSAM
from support import batch, bits, by_closure, model_bits, net, plain, train

OURS = {"lr": 0.02, "n_data": 50, "rho": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.01, "damping": 0.2}
THEIRS = {"alpha": 0.02, "N": 50, "rho": 0.1, "beta1": 0.8, "beta2": 0.9, "delta": 0.01, "gamma": 0.2}


def noise(t):
    drawn = random_tensors.normal("BSAM/0", 4, t, split(start()))
    return torch.cat([n.reshape(-1) for n in drawn])


def want(noise=noise, **changes):
    return bsam(loss, start(), 20, noise, **(THEIRS | changes))


@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_it_matches_its_slow_reference(drive):
    agree(trained(lambda ps: BSAM(ps, seed=4, **OURS), drive), want())


@pytest.mark.parametrize("changed", THEIRS)
def test_mutants_are_killed(changed):
    ours = trained(lambda ps: BSAM(ps, seed=4, **OURS))
    with pytest.raises(AssertionError):
        agree(ours, want(**{changed: 1.001 * THEIRS[changed]}))
    with pytest.raises(AssertionError):
        agree(ours, want(lambda t: 0 * noise(t)))
    with pytest.raises(AssertionError):
        agree(ours, want(rho=0.0))


def test_the_noise_has_the_posteriors_variance_and_depends_on_seed_and_step_alone():
    w = torch.nn.Parameter(torch.full((20000,), 5.0))
    seen = []

    def sampled(seed):
        optimizer = BSAM([w], 0.0, n_data=25, scale=4.0, seed=seed)
        for sam_pass in optimizer.passes():
            with sam_pass:
                seen.append(w.detach().clone())
                w.sum().backward()
        optimizer.step()
        return optimizer

    before = torch.get_rng_state()
    again = sampled(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (w == 5).all()
    n = seen[0] - 5
    assert n.mean().item() == pytest.approx(0, abs=3e-3)
    assert n.std().item() == pytest.approx((25 * 4.0) ** -0.5, rel=0.03)
    torch.testing.assert_close(seen[1], torch.full_like(w, 5 + 0.01 / 4))
    torch.manual_seed(123)
    sampled(0)
    sampled(1)
    assert torch.equal(seen[2], seen[0])
    assert not torch.equal(seen[4], seen[0])
    for sam_pass in again.passes():
        with sam_pass:
            seen.append(w.detach().clone())
            w.sum().backward()
    assert abs(torch.corrcoef(torch.stack([seen[6], seen[0]]))[0, 1]) < 0.05


def test_the_loss_is_that_at_the_sample_and_the_scale_grows_with_the_gradient():
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = BSAM([w], lr=0.0, n_data=10, betas=(0.9, 0.5), weight_decay=0.0, damping=0.0)
    got = by_closure(optimizer, lambda: (w * torch.tensor([4.0, 0.0])).sum())
    n = random_tensors.normal("BSAM/0", 0, 0, [w])[0] / 10**0.5
    assert got.item() == pytest.approx(4 * (1 + n[0].item()))
    torch.testing.assert_close(optimizer.state[w]["scale"], torch.tensor([0.5 + 0.5 * 4, 0.5]))


def test_accumulated_micro_batches_each_have_their_own_noise_and_climb():
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = BSAM([w], lr=0.1, n_data=10, rho=0.2, betas=(0.0, 0.5), weight_decay=0.0, damping=0.1)
    for i, a in enumerate((1.0, -2.0)):
        for sam_pass in optimizer.passes(accumulate=i > 0):
            with sam_pass:
                (a * w**3 / 2).sum().backward()
    optimizer.step()
    g_e, size = 0.0, 0.0
    for i, a in enumerate((0.5, -1.0)):
        n = random_tensors.normal(f"BSAM/{i}", 0, 0, [w])[0].item() / 10**0.5
        g = 3 * a * (1 + n) ** 2
        size += abs(g)
        g_e += 3 * a * (1 + 0.2 * g) ** 2
    s = 0.5 + 0.5 * (size + 0.1)
    assert optimizer.state[w]["scale"].item() == pytest.approx(s, rel=1e-12)
    assert w.item() == pytest.approx(1 - 0.1 * g_e / s, rel=1e-12)


def test_groups_have_their_own_values():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [a], "lr": 0.0}, {"params": [b], "scale": 3.0, "weight_decay": 0.0, "sam_rho": 0.7}]
    optimizer = BSAM(groups, lr=0.1, n_data=10)
    assert optimizer.state[b]["scale"].item() == 3.0
    assert optimizer.param_groups[1]["sam_rho"] == 0.7
    by_closure(optimizer, lambda: (a * b).sum())
    assert a.item() == 1.0
    assert b.item() != 1.0


def test_without_noise_climb_prior_and_curvature_it_is_momentum():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    nothing = {"n_data": 1e30, "rho": 0.0, "betas": (0.9, 1 - 1e-12), "weight_decay": 0.0, "damping": 0.0}
    train(model, BSAM(model.parameters(), 0.1, **nothing, model=model), by_closure, 4)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, dampening=0.9)
    for p in twin.parameters():
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)  # else the first gradient counts in full
    train(twin, sgd, plain, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_on_an_accelerator_a_bad_step_is_skipped_exactly():
    model = net(dropout=0.0)
    optimizer = BSAM(model.parameters(), 0.1, n_data=100, model=model)
    train(model, optimizer, by_closure, 2)
    before = bits(model.parameters()), bits(t for s in optimizer.state.values() for t in s.values())
    x, y = batch()
    for sam_pass in optimizer.passes():
        with sam_pass:
            (F.cross_entropy(model(x), y) * (float("nan") if sam_pass.is_perturbed else 1)).backward()
    gradients = optimizer._engine.gradients
    gradients._step_on_device(torch.tensor(False), gradients.of(gradients.parameters()))  # what a device would do
    assert (bits(model.parameters()), bits(t for s in optimizer.state.values() for t in s.values())) == before


def test_the_base_checkpoint_is_the_whole_state():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    one, two = (BSAM(m.parameters(), 0.1, n_data=100, model=m) for m in (model, twin))
    train(model, one, by_closure, 2)
    twin.load_state_dict(model.state_dict())
    two.base.load_state_dict(through_a_file(one.state_dict()))  # behind the wrapper's back
    train(model, one, by_closure, 2, start=2)
    train(twin, two, by_closure, 2, start=2)
    assert model_bits(twin) == model_bits(model)


@pytest.mark.parametrize(
    "wrong",
    [{"n_data": 0}, {"betas": (1.0, 0.9)}, {"weight_decay": -1.0}, {"damping": -0.1}, {"scale": 0.0}, {"lr": -1.0}],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BSAM([torch.nn.Parameter(torch.ones(1))], **({"n_data": 10} | wrong))


def test_a_plain_step_uses_the_gradient_that_is_there():
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = BSAM([w], 0.1, n_data=10)
    w.grad = torch.ones(1)
    with pytest.warns(UserWarning, match="a plain step"):
        optimizer.step()
    assert w.item() < 1
    with pytest.raises(RuntimeError, match=r"give the closure to BSAM\.step"):
        optimizer.base.step(lambda: None)
