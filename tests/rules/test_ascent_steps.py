"""Several ascent steps against their slow reference, and the weights and buffers between them."""

import pytest
import torch
from torch import nn

import steppe
from checks import bumpy, resumes, split
from reference import asam_e, loss_and_gradient, sam_e
from steppe import SAM, AscentSteps
from steppe.rules import averages_memory, scale_free
from support import BASES, DRIVES, bits, by_classic, by_closure, by_passes, model_bits, net, train

RHO = 0.3


def ascend(w, e, length, alpha, K, project):
    """e_k = P(e_{k-1} + alpha rho d(grad L(w + e_{k-1}))), from e_0 = 0."""
    for _ in range(K):
        _, g = loss_and_gradient(bumpy, w + e)
        e = e + alpha * length(w, g)
        if project and e.norm() > RHO:
            e = RHO * e / e.norm()
    return e


CASES = {
    "sam-3": (AscentSteps(steppe.L2(), 3), lambda w, g: sam_e(w, g, RHO), 1 / 3, 3, False),
    "sam-2-long": (AscentSteps(steppe.L2(), 2, alpha=0.9), lambda w, g: sam_e(w, g, RHO), 0.9, 2, True),
    "asam-2": (AscentSteps(steppe.Adaptive(), 2), lambda w, g: asam_e(w, g, RHO), 0.5, 2, False),
}


def matches_reference(case, base, drive, rule=None):
    ours, length, alpha, K, project = CASES[case]
    torch.manual_seed(3)
    w = torch.randn(10, dtype=torch.float64)
    params = [nn.Parameter(p) for p in split(w)]
    optimizer = SAM(BASES[base](params), RHO, perturbation=rule or ours)
    flat = w.clone().requires_grad_()
    reference = BASES[base]([flat])
    for _ in range(20):
        at_w = flat.detach()
        e = ascend(at_w, torch.zeros_like(at_w), length, alpha, K, project)
        _, flat.grad = loss_and_gradient(bumpy, at_w + e)
        reference.step()
        DRIVES[drive](optimizer, lambda: bumpy(torch.cat([p.reshape(-1) for p in params])))
    torch.testing.assert_close(
        torch.cat([p.detach().reshape(-1) for p in params]), flat.detach(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("drive", ["closure", "passes"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_ascent_steps_match_their_slow_reference(case, base, drive):
    matches_reference(case, base, drive)


@pytest.mark.parametrize(
    ("case", "mutant"),
    [
        ("sam-3", AscentSteps(steppe.L2(), 2)),
        ("sam-3", steppe.L2()),
        ("sam-3", AscentSteps(steppe.L2(), 3, alpha=0.3)),
        ("sam-2-long", AscentSteps(steppe.L2(), 2, alpha=0.5)),
        ("asam-2", AscentSteps(steppe.L2(), 2)),
    ],
)
def test_mutant_other_number_or_length_of_ascent_steps_is_killed(case, mutant):
    with pytest.raises(AssertionError):
        matches_reference(case, "sgd", "passes", mutant)


def test_one_ascent_step_is_the_rule_itself():
    models = [net(), net()]
    for model, rule in zip(models, (steppe.L2(), AscentSteps(steppe.L2(), 1)), strict=True):
        torch.manual_seed(1)
        train(model, SAM(BASES["momentum"](model.parameters()), 0.1, model=model, perturbation=rule), by_closure, 5)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_passes_restore_the_weights_and_leave_buffers_as_one_pass_does():
    """1 + K passes; the weights are at w between them; buffers and generators end as after one pass."""
    model, twin = net(), net()
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.0), 0.5, model=model, perturbation=AscentSteps(steppe.L2(), 3)
    )
    x = torch.randn(6, 1, 8, 8)
    torch.manual_seed(7)
    twin(x)
    after_one = torch.get_rng_state()
    torch.manual_seed(7)
    w, sam_passes, points = bits(model.parameters()), [], []
    for sam_pass in optimizer.passes():
        with sam_pass:
            points.append(bits(model.parameters()))
            model(x).square().sum().backward()
        assert bits(model.parameters()) == w
        sam_passes.append((sam_pass.is_first, sam_pass.is_perturbed, sam_pass.is_last))
    assert sam_passes == [(True, False, False), (False, True, False), (False, True, False), (False, True, True)]
    assert points[0] == w
    assert len({str(p) for p in points}) == 4
    assert model_bits(model) == model_bits(twin)
    assert torch.equal(torch.get_rng_state(), after_one)
    assert optimizer.current_pass is None


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_gradient_that_is_not_finite_in_any_pass_skips_the_step(bad):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), 0.1, perturbation=AscentSteps(steppe.L2(), 2))
    calls = []

    def loss():
        calls.append(1)
        return w.square().sum() * (float("nan") if len(calls) == bad + 1 else 1.0)

    with pytest.warns(RuntimeWarning, match="skipped"):
        by_closure(optimizer, loss)
    assert w.tolist() == [1.0, 2.0]
    by_closure(optimizer, loss)
    assert w.tolist() != [1.0, 2.0]
    assert optimizer.skipped_steps == 1


def test_exception_in_the_last_pass_restores_the_weights():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), 0.1, perturbation=AscentSteps(steppe.L2(), 2))

    def loss():
        if optimizer.current_pass.is_last:
            raise KeyboardInterrupt
        return w.square().sum()

    with pytest.raises(KeyboardInterrupt):
        by_passes(optimizer, loss)
    assert w.tolist() == [1.0, 2.0]


def test_unperturbed_gradients_are_those_at_w():
    """PGN with alpha = 0 updates with g; a parameter without a gradient in the other passes counts as zero there."""
    w, v = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    rules = {"perturbation": AscentSteps(steppe.L2(), 3), "combination": steppe.PenalizedNorm(0.0)}
    optimizer = SAM(torch.optim.SGD([w, v], lr=0.1), 0.1, **rules)
    for sam_pass in optimizer.passes():
        with sam_pass:
            (w.pow(3).sum() + (0 if sam_pass.is_perturbed else v.sum())).backward()
    assert torch.equal(w.grad, 3 * torch.tensor([1.0, 4.0]))
    assert torch.equal(v.grad, torch.ones(2))


def test_resumed_run_has_the_same_bits():
    rule = AscentSteps(steppe.VarianceSuppressed(0.5), 2)
    resumes(lambda model: SAM(BASES["momentum"](model.parameters()), 0.1, model=model, perturbation=rule), "closure")


def test_subset_inside_and_outside_give_the_same_bits():
    ends = []
    for wrap in (
        lambda ps: AscentSteps(steppe.ParameterSubset(steppe.L2(), ps), 2),
        lambda ps: steppe.ParameterSubset(AscentSteps(steppe.L2(), 2), ps),
    ):
        model = net(dropout=0.0)
        perturbation = wrap(list(model.layers[0].parameters()))
        optimizer = SAM(BASES["sgd"](model.parameters()), 0.3, perturbation=perturbation, model=model)
        train(model, optimizer, by_closure, 3)
        ends.append(bits(model.parameters()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AscentSteps(steppe.L2(), 0), "ascent_steps must be 1 or more"),
        (lambda: AscentSteps(steppe.L2(), 2, alpha=0.0), "alpha must be finite"),
        (lambda: AscentSteps(steppe.Adaptive(), 2, alpha=0.6), "known for L2 only"),
        (lambda: AscentSteps(steppe.Momentum(), 2), "does not use the gradient"),
        (lambda: AscentSteps(AscentSteps(steppe.L2(), 2), 2), "already makes 2 ascent steps"),
    ],
)
def test_hyperparameter_or_rule_that_does_not_fit_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_classic_api_with_several_ascent_steps_is_an_error():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), perturbation=AscentSteps(steppe.L2(), 2))
    with pytest.raises(RuntimeError, match="makes 2 ascent steps"):
        by_classic(optimizer, lambda: w.square().sum())


def test_ascent_steps_are_scale_free_like_the_rule_and_never_averaged_over_micro_batches():
    assert scale_free(AscentSteps(steppe.L2(), 2))
    assert not scale_free(AscentSteps(steppe.Friendly(), 2))
    assert averages_memory(steppe.Friendly())
    assert not averages_memory(AscentSteps(steppe.Friendly(), 2))


def test_ascent_steps_need_no_loss_scaler_argument():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), 0.5, perturbation=AscentSteps(steppe.L2(), 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for sam_pass in optimizer.passes():
        with sam_pass:
            scaler.scale(w.square().sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(w.detach(), torch.tensor([3.0, 4.0]) * (1 - 0.1 * 2 * 1.1))
