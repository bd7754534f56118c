"""SASSHA: against its slow reference with exact Hessians and the same signs; its estimate, errors and special cases."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from own_step_problem import Loss, assert_close, gradient, state_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import steppe
from steppe import closures, variants
from steppe._tensors import random as random_tensors
from steppe.methods.sassha import CARD, SASSHA, Preconditioned
from support import DRIVES, batch, bits, by_closure, model_bits, net, observed, parameter, saved_and_loaded, train

SHAPES = ((4, 2), (4,), (3, 4), (3,))
SIZES = [torch.Size(shape).numel() for shape in SHAPES]
STEPS = 20


def start() -> Tensor:
    return 0.7 * torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def parts(w: Tensor) -> list[Tensor]:
    return [part.reshape(shape) for part, shape in zip(w.split(SIZES), SHAPES, strict=True)]


def network_loss(weights: list[Tensor], t: int) -> Tensor:
    """The loss of a small network on batch t."""
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (6,), generator=generator)
    first, bias, second, offset = weights
    return F.cross_entropy(F.linear(torch.tanh(F.linear(x, first, bias)), second, offset), y)


def loss(w: Tensor, t: int) -> Tensor:
    return network_loss(parts(w), t)


def signs(seed: int, t: int) -> Tensor:
    drawn = random_tensors.integers("SASSHA", seed, t, parts(start()), below=2)
    return torch.cat([2.0 * n.reshape(-1) - 1 for n in drawn]).double()


def sassha(L: Loss, w: Tensor, steps: int, *, eta, rho, beta1, beta2, eps, decay, k, seed=4, mutant=""):
    """arXiv 2502.18153: the equations of the algorithm, with whole Hessians."""
    x, m, D = w.detach().clone(), torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, steps + 1):
        g = gradient(L, x, t - 1)
        epsilon = rho * g / g.square().sum().sqrt()
        m = beta1 * m + (1 - beta1) * gradient(L, x + epsilon, t - 1)
        if (t - 1) % k == 0:
            z = signs(seed, t - 1)
            at = x if mutant == "Hessian at w" else x + epsilon
            H = torch.autograd.functional.hessian(lambda v, t=t: L(v, t - 1), at)
            estimate = H.diagonal() if mutant == "exact diagonal" else z * (H @ z)
            D = beta2 * D + (1 - beta2) * (estimate.square() if mutant == "square" else estimate.abs())
            if mutant == "signed":
                D = (D - (1 - beta2) * (estimate.abs() - estimate)).clamp(min=0)
            estimates = (t - 1) // k + 1
            correction = 1 - beta2 ** (estimates if mutant == "correction by estimates" else t)
            correction = 1 if mutant == "no correction of D" else correction
        m_bar = m if mutant == "no correction of m" else m / (1 - beta1**t)
        root = (D / correction + eps).sqrt() if mutant == "eps in the root" else (D / correction).sqrt() + eps
        x = x - eta * m_bar / (D / correction + eps if mutant == "no root" else root)
        x = x - eta * decay * (x if mutant == "decay after the step" else x + eta * m_bar / root)
    return x


PAPER = {"eta": 0.01, "rho": 0.2, "beta1": 0.8, "beta2": 0.95, "eps": 0.05, "decay": 0.1, "k": 3}
OURS = {"lr": 0.01, "rho": 0.2, "betas": (0.8, 0.95), "eps": 0.05, "weight_decay": 0.1, "interval": 3, "seed": 4}
MUTANTS = [
    *("Hessian at w", "exact diagonal", "square", "signed", "no root", "eps in the root", "decay after the step"),
    *("no correction of m", "no correction of D", "correction by estimates"),
]


def trained(drive: str = "closure", **changes) -> Tensor:
    params = [nn.Parameter(p.clone()) for p in parts(start())]
    optimizer = SASSHA(params, **(OURS | changes))
    for t in range(STEPS):
        DRIVES[drive](optimizer, lambda t=t: network_loss(params, t))
    return torch.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_sassha_matches_its_slow_reference(drive):
    assert_close(trained(drive), sassha(loss, start(), STEPS, **PAPER))


@pytest.mark.parametrize("interval", [1, 10])
def test_sassha_matches_its_slow_reference_at_other_intervals(interval):
    assert_close(trained(interval=interval), sassha(loss, start(), STEPS, **(PAPER | {"k": interval})))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_of_the_formula_is_killed(mutant):
    with pytest.raises(AssertionError):
        assert_close(trained(), sassha(loss, start(), STEPS, **PAPER, mutant=mutant))


@pytest.mark.parametrize("changed", [*PAPER, "seed"])
def test_mutant_with_another_hyperparameter_is_killed(changed):
    values = PAPER | {"seed": 4}
    values[changed] = values[changed] + 1 if changed in ("k", "seed") else 1.001 * values[changed]
    with pytest.raises(AssertionError):
        assert_close(trained(), sassha(loss, start(), STEPS, **values))


# The estimate.


def test_signs_depend_on_seed_and_step_only_and_no_global_generator_is_used():
    w = nn.Parameter(torch.zeros(4000))
    matrix = torch.full((2, 2), 1.0)

    def estimate(optimizer):
        by_closure(optimizer, lambda: (w.view(2, -1).T @ matrix @ w.view(2, -1)).diagonal().sum() / 2)
        return optimizer.state[w]["hessian"].clone()

    before = torch.get_rng_state()
    optimizer = SASSHA([w], 0.0, interval=1, betas=(0.0, 0.0))
    first, second = estimate(optimizer), estimate(optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    # z_i (H z)_i = 1 + z_i z_j is 0 or 2, each half of the time
    assert set(first.tolist()) == {0.0, 2.0}
    assert first.mean().item() == pytest.approx(1, abs=0.1)
    assert not torch.equal(first, second)
    torch.manual_seed(77)
    assert torch.equal(estimate(SASSHA([w], 0.0, interval=1, betas=(0.0, 0.0))), first)
    assert not torch.equal(estimate(SASSHA([w], 0.0, interval=1, betas=(0.0, 0.0), seed=1)), first)


def test_estimate_of_a_diagonal_hessian_is_exact_and_that_at_the_perturbed_weights():
    w = parameter(1.0, -2.0, 0.5, dtype=torch.float64)
    start = w.detach().clone()
    optimizer = SASSHA([w], 0.1, rho=0.3, betas=(0.0, 0.0), eps=1e-12)
    by_closure(optimizer, lambda: -w.pow(4).sum() / 12)
    g = -start.pow(3) / 3
    perturbed = start + 0.3 * g / g.norm()
    torch.testing.assert_close(optimizer.state[w]["hessian"], perturbed.square())
    torch.testing.assert_close(w.detach(), start + 0.1 * perturbed.pow(3) / 3 / perturbed.abs())


def test_step_makes_two_forwards_whether_it_estimates_or_not_and_counts_its_cost():
    model, forwards = net(dropout=0.0), []
    optimizer = SASSHA(model.parameters(), 0.01, interval=3, model=model)
    model.register_forward_hook(lambda *_: forwards.append(1))
    train(model, optimizer, by_closure, 6)
    assert len(forwards) == 2 * 6 == CARD.passes_with() * 6
    assert [optimizer.estimates_next, CARD.comparison.passes(10), CARD.comparison.passes(1)] == [True, 2.3, 5]


def test_loss_is_as_without_the_estimate_outside_of_a_pass_and_without_a_gradient():
    w = parameter(1.0, 2.0)
    optimizer = SASSHA([w])
    criterion = closures.hessian_diagonal(optimizer, lambda factor, *, power: factor * w.pow(power).sum())
    assert criterion(2.0, power=2).item() == 10
    with torch.no_grad():
        assert criterion(1.0, power=3).item() == 9
    for sam_pass in optimizer.passes():
        with sam_pass:
            with torch.no_grad():
                criterion(1.0, power=2)
            criterion(1.0, power=2)  # no backward: it does not count
            criterion(1.0, power=2).backward()
    torch.testing.assert_close(optimizer._pending[w], torch.full((2,), 2.0))


def test_micro_batches_inside_each_pass_are_the_whole_batch():
    x, y = batch(3, dtype=torch.float64)
    ends = []
    for pieces in (1, 3):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        for i, p in enumerate(model.parameters()):
            nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
        optimizer = SASSHA(model.parameters(), 0.05, interval=2, model=model)
        criterion = closures.hessian_diagonal(optimizer, F.cross_entropy)
        for _ in range(3):
            for sam_pass in optimizer.passes():
                with sam_pass:
                    for part, labels in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                        (criterion(model(part), labels) * (len(part) / len(x))).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


def test_micro_batches_with_perturbations_of_their_own_add_up():
    w = parameter(1.0, dtype=torch.float64)
    optimizer = SASSHA([w], lr=0.1, rho=0.2, betas=(0.0, 0.0), eps=1e-3)
    criterion = closures.hessian_diagonal(optimizer, lambda a: a * w.pow(3).sum())
    for i, a in enumerate((1.0, -4.0)):
        for sam_pass in optimizer.passes(accumulate=i > 0, loss_weight=0.5):
            with sam_pass:
                (criterion(a) * 0.5).backward()
    optimizer.step()
    g_s = 0.5 * (3 * 1.2**2 - 12 * 0.8**2)
    curvature = 0.5 * (6 * 1.2 - 24 * 0.8)
    assert optimizer.state[w]["hessian"].item() == pytest.approx(abs(curvature), rel=1e-12)
    assert w.item() == pytest.approx(1 - 0.1 * g_s / (abs(curvature) ** 0.5 + 1e-3), rel=1e-12)


def test_micro_batch_that_has_failed_is_no_part_of_the_estimate():
    ends = []
    for parts in ((1.0, None, 3.0), (1.0, 3.0)):
        w = parameter(1.0, 2.0)
        optimizer = SASSHA([w], 0.1)
        criterion = closures.hessian_diagonal(optimizer, lambda factor, w=w: factor * w.pow(4).sum())
        for i, factor in enumerate(parts):
            with contextlib.suppress(MemoryError):
                for sam_pass in optimizer.passes(accumulate=i > 0, loss_weight=0.25):
                    with sam_pass:
                        criterion(factor or 100.0).backward()
                        if factor is None and sam_pass.is_last:
                            raise MemoryError
        optimizer.step()
        ends.append(w.tolist())
    assert ends[0] == ends[1]


def test_complex_parameters_equal_real_ones_with_a_hessian_that_is_not_diagonal():
    z = nn.Parameter(torch.tensor([0.3 + 0.4j, 0.1 - 0.2j], dtype=torch.complex128))
    real = nn.Parameter(torch.view_as_real(z.detach()).clone())
    for p in (z, real):
        optimizer = SASSHA([p], 0.05, interval=2)
        for _ in range(4):
            by_closure(optimizer, lambda p=p: (torch.view_as_real(p) if p.is_complex() else p).sum().cos())
    torch.testing.assert_close(torch.view_as_real(z.detach()), real.detach(), rtol=1e-12, atol=1e-12)


def test_linear_loss_has_the_hessian_zero_and_parameter_without_a_gradient_none():
    a, b = parameter(1.0, 1.0), parameter(5.0)
    optimizer = SASSHA([a, b], 0.1, betas=(0.0, 0.0), eps=0.5)
    by_closure(optimizer, lambda: (a * torch.tensor([1.0, -2.0])).sum())
    torch.testing.assert_close(a.detach(), 1 - 0.1 * torch.tensor([1.0, -2.0]) / 0.5)
    assert b.item() == 5
    assert optimizer.state[b]["step"] == 0


def test_parameter_waits_for_its_first_estimate():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = SASSHA([a, b], 0.1, interval=2, weight_decay=0.5)
    by_closure(optimizer, lambda: a.square().sum())
    by_closure(optimizer, lambda: (a.square() + b.square()).sum())
    assert b.item() == pytest.approx(0.95)  # it has only decayed
    by_closure(optimizer, lambda: (a.square() + b.square()).sum())
    assert b.item() < 0.9


def test_groups_have_their_own_hyperparameters():
    a, b = parameter(1.0), parameter(1.0)
    groups = [{"params": [a], "lr": 0.0}, {"params": [b], "betas": (0.0, 0.0), "eps": 1.0, "sam_rho": 0.0}]
    optimizer = SASSHA(groups, lr=0.1)
    by_closure(optimizer, lambda: (a.square() + 2 * b.square()).sum())
    assert a.item() == 1
    assert b.item() == pytest.approx(1 - 0.1 * 4 / (2 + 1))


def test_perturbation_can_be_assigned_and_the_other_rules_not():
    w = parameter(1.0, 2.0)
    optimizer = SASSHA([w])
    optimizer.perturbation = steppe.Adaptive(eta=0.0)
    by_closure(optimizer, lambda: w.square().sum())  # e = rho w^2 g / |w g|, g = 2 w, H = 2
    torch.testing.assert_close(optimizer.state[w]["hessian"], torch.full((2,), 0.002))
    e = 0.2 * torch.tensor([1.0, 8.0]) / 17**0.5
    torch.testing.assert_close(optimizer.state[w]["momentum"], 0.2 * (torch.tensor([1.0, 2.0]) + e))
    with pytest.raises(TypeError, match="has a cadence of its own"):
        optimizer.cadence = steppe.Periodic(2)
    with pytest.raises(TypeError, match="has a combination of its own"):
        optimizer.combination = steppe.SurrogateGap()


# Checkpoints.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["wrapper", "base"])
def test_run_resumed_between_two_estimates_has_the_same_bits(part, dtype):
    model, twin = net(dropout=0.0, dtype=dtype), net(seed=9, dropout=0.0, dtype=dtype)
    one, two = (SASSHA(m.parameters(), 0.05, interval=4, model=m) for m in (model, twin))
    train(model, one, by_closure, 6)
    twin.load_state_dict(model.state_dict())
    (two if part == "wrapper" else two.base).load_state_dict(saved_and_loaded(one.state_dict()))
    train(model, one, by_closure, 6, start=6)
    train(twin, two, by_closure, 6, start=6)
    assert model_bits(twin) == model_bits(model)
    assert state_bits(two) == state_bits(one)
    assert all(p.isfinite().all() for p in model.parameters())


# Steps that are not finite.


def test_estimate_that_is_not_finite_skips_the_step_and_is_made_again():
    w = parameter(0.0, 1.0)
    optimizer = SASSHA([w], 0.1, rho=0.0)
    before, state = bits([w]), state_bits(optimizer)
    with pytest.warns(RuntimeWarning, match="skipped"):  # the gradient is finite, and the second derivative at 0 is not
        by_closure(optimizer, lambda: w.abs().pow(1.5).sum())
    assert (optimizer.skipped_steps, bits([w]), state_bits(optimizer)) == (1, before, state)
    by_closure(optimizer, lambda: w.square().sum())
    assert optimizer.state[w]["hessian"].tolist() == pytest.approx([0.002, 0.002])
    assert optimizer.skipped_steps == 1


def test_accelerator_skips_a_step_that_is_not_finite_without_changing_weights_or_state():
    model = net(dropout=0.0)
    optimizer = SASSHA(model.parameters(), 0.1, interval=2, weight_decay=0.1, model=model)
    train(model, optimizer, by_closure, 2)
    before = bits(model.parameters()), state_bits(optimizer)
    x, y = batch()
    criterion = closures.hessian_diagonal(optimizer, F.cross_entropy)
    for sam_pass in optimizer.passes():
        with sam_pass:
            (criterion(model(x), y) * (float("nan") if sam_pass.is_perturbed else 1)).backward()
    gradients = optimizer._engine.gradients
    optimizer.base.estimates = optimizer._estimates()
    gradients._step_on_device(torch.tensor(False), gradients.views(gradients.parameters()))  # as on an accelerator
    assert (bits(model.parameters()), state_bits(optimizer)) == before


# Errors.


def test_backward_of_a_plain_loss_is_an_error_where_an_estimate_is_due_and_the_step_can_be_repeated():
    model = net(dropout=0.0)
    optimizer = SASSHA(model.parameters(), 0.05, interval=2, model=model)
    before, state = bits(model.parameters()), state_bits(optimizer)
    x, y = batch()

    def plain_closure():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    with pytest.raises(
        RuntimeError, match=r"without an estimate.*first of every 2 steps.*closures\.hessian_diagonal\(optimizer"
    ):
        optimizer.step(plain_closure)
    assert (bits(model.parameters()), state_bits(optimizer)) == (before, state)
    train(model, optimizer, by_closure, 1)
    optimizer.step(plain_closure)  # none is due
    assert optimizer.steps_taken == 2


@pytest.mark.parametrize("cause", ["term outside", "reentrant checkpoint"])
def test_gradient_that_the_estimate_does_not_cover_is_an_error(cause):
    first, last, w = nn.Linear(3, 4), nn.Linear(4, 2), parameter(1.0)
    optimizer = SASSHA([*first.parameters(), *last.parameters(), w])
    x = torch.ones(2, 3, requires_grad=True)

    def value(reentrant):
        return last(checkpoint(lambda x: first(x).tanh(), x, use_reentrant=reentrant)).square().sum()

    criterion = closures.hessian_diagonal(optimizer, value)
    count = 1 if cause == "term outside" else 2
    with pytest.raises(RuntimeError, match=f"^{count} parameters with a gradient and without .*whole loss.*reentrant"):
        optimizer.step(lambda: criterion(False) + w.square().sum() if cause == "term outside" else criterion(True))
    assert w.item() == 1
    optimizer.zero_grad()
    optimizer.step(lambda: criterion(False))
    assert len(optimizer.state[first.weight]["hessian"].unique()) > 1


def test_other_optimizers_and_losses_that_are_no_number_are_errors():
    w = parameter(1.0, 2.0)
    with pytest.raises(TypeError, match=r"needs an optimizer of steppe\.variants\.sassha, got SAM"):
        closures.hessian_diagonal(steppe.SAM(torch.optim.SGD([w], lr=0.1)), w.sum)
    optimizer = variants.sassha([w])
    with pytest.raises(ValueError, match="return the mean, one number"):
        optimizer.step(observed(optimizer, lambda: w.square()))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"interval": 0}, {"interval": 2.5}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": 0.0}),
        *({"eps": math.inf}, {"weight_decay": -1.0}, {"lr": -1.0}, {"rho": -0.1}),
    ],
)
def test_argument_out_of_range_is_an_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SASSHA([parameter(1.0)], **wrong)


def test_group_out_of_range_is_an_error_and_is_not_added():
    optimizer = SASSHA([parameter(1.0)])
    with pytest.raises(ValueError, match="eps must be finite and more than 0"):
        optimizer.add_param_group({"params": [parameter(1.0)], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


def test_plain_step_uses_the_present_gradient_and_the_last_estimate():
    w = parameter(1.0)
    optimizer = SASSHA([w], 0.1, betas=(0.0, 0.0), eps=1e-6)
    by_closure(optimizer, lambda: 2 * w.square().sum())
    before = w.item()
    w.grad = torch.ones(1)
    with pytest.warns(UserWarning, match="a plain step"):
        optimizer.step()
    assert w.item() == pytest.approx(before - 0.1 / 2, rel=1e-4)
    with pytest.raises(RuntimeError, match=r"give the closure to SASSHA\.step"):
        optimizer.base.step(lambda: None)
    assert isinstance(optimizer.base, Preconditioned)


def test_operation_with_a_wrong_second_derivative_is_an_error():
    """The fused weight norm of torch holds the norm constant when it is differentiated twice."""
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    optimizer = variants.sassha(model.parameters(), model=model)
    criterion = closures.hessian_diagonal(optimizer, F.cross_entropy)
    with pytest.raises(RuntimeError, match="torch's weight_norm has a wrong second derivative"):
        optimizer.step(lambda: criterion(model(torch.ones(4, 3)), torch.tensor([0, 1, 0, 1])))
