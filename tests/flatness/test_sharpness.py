"""Sharpness against exact maxima over the ball, the perturbed weights of SAM, and invariant rescalings."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from known_hessians import (
    DOUBLE,
    exact_maximum,
    matrix_with_spectrum,
    objective,
    quadratic,
    relu_net,
    rescaled,
    samples,
    tanh_net,
)
from torch import nn

import steppe
from steppe.flatness import Objective, m_sharpness, sharpness
from support import each_in_turn


def random_b(length, n, seed=5):
    b = torch.randn(n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return b * length / b.norm()


SPECTRA = {
    "convex": torch.linspace(0.0, 1.0, 30).tolist(),
    "outliers": [*torch.linspace(0.0, 0.2, 26).tolist(), 1.0, 3.0, 5.0, 10.0],
    "indefinite": torch.linspace(-1.0, 1.0, 30).tolist(),
    "mostly concave": [-10.0, -5.0, *torch.linspace(-1.0, 0.5, 28).tolist()],
    "concave": [-x for x in torch.logspace(-1, 1, 30).tolist()],
}
SLOPES = [10.0, 1.0, 0.1]


@pytest.mark.parametrize(("spectrum", "slope"), each_in_turn(SPECTRA, SLOPES))
def test_sharpness_of_quadratics_is_close_to_the_exact_maximum(spectrum, slope):
    a, b = matrix_with_spectrum(SPECTRA[spectrum]), random_b(slope, 30)
    exact = exact_maximum(a, b, 0.7)
    found = sharpness(quadratic(a, b), 0.7, restarts=3)
    assert 0.96 * exact < found.value <= exact * (1 + 1e-9)
    assert sharpness(quadratic(a, b), 0.7, restarts=3, ascent_steps=100).value > 0.999 * exact


def test_best_perturbation_lies_in_the_ball_and_has_the_returned_loss():
    for rho, norm, adaptive in itertools.product([0.1, 1.0], ["l2", "linf"], [False, True]):
        problem = objective(tanh_net())
        found = sharpness(problem, rho, norm=norm, ascent_steps=6, restarts=3, adaptive=adaptive)
        z = found.e / problem.weights.abs() if adaptive else found.e
        assert float(torch.linalg.vector_norm(z, 2 if norm == "l2" else math.inf)) <= rho * (1 + 1e-12)
        there = float(problem.loss(found.e) - problem.loss())
        assert found.value == pytest.approx(there, rel=1e-12)
        assert found.value == max(found.restarts) >= found.restarts[0] >= found.one_step
        assert found.loss == float(problem.loss())


def test_every_pass_is_counted_and_none_is_repeated():
    problem = objective(tanh_net())
    found = sharpness(problem, 0.5, ascent_steps=4, restarts=3)
    assert found.passes == problem.passes == 1 + 4 * 3
    assert sharpness(problem, 0.5, ascent_steps=1, restarts=1).passes == 2


def test_random_restarts_find_a_maximum_orthogonal_to_the_gradient():
    a = matrix_with_spectrum([-1.0, 0.2, 0.5, 4.0])
    _, q = torch.linalg.eigh(a)
    b = 0.1 * (q[:, 0] + q[:, 1] + q[:, 2])  # orthogonal to the top eigenvector
    exact = exact_maximum(a, b, 1.0)
    assert sharpness(quadratic(a, b), 1.0, restarts=1, ascent_steps=10).value < 0.4 * exact
    assert exact * 0.9999 < sharpness(quadratic(a, b), 1.0).value <= exact * (1 + 1e-9)


def test_sharpness_at_a_minimum_is_half_lambda_max_rho_squared():
    found = sharpness(quadratic(matrix_with_spectrum([0.1, 1.0, 6.0])), 0.5)
    assert found.value == pytest.approx(0.5 * 6.0 * 0.25, rel=1e-6)
    assert (found.one_step, found.first_order, found.restarts[0], found.gradient_norm) == (0, 0, 0, 0)


def test_sharpness_at_a_maximum_is_zero():
    found = sharpness(quadratic(matrix_with_spectrum([-2.0, -1.0]), random_b(1e-9, 2)), 0.5, ascent_steps=3)
    assert 0 <= found.value < 1e-15
    assert found.one_step < -0.1
    assert found.e.norm() < 1e-6


def test_linf_finds_the_best_corner():
    a, b = matrix_with_spectrum([0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 2.5, 3.0]), random_b(0.5, 8)
    corners = 0.3 * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=DOUBLE)
    exact = float((((corners @ a) * corners).sum(1) / 2 + corners @ b).max())  # convex: the maximum is at a corner
    found = sharpness(quadratic(a, b), 0.3, norm="linf", restarts=30)
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert found.first_order == pytest.approx(0.3 * float(b.abs().sum()))


def test_linf_finds_a_maximum_inside_the_box():
    a, target = torch.diag(torch.tensor([-1.0, -4.0, -9.0], dtype=DOUBLE)), torch.tensor([0.5, -0.2, 3.0], dtype=DOUBLE)
    found = sharpness(quadratic(a, -a @ target), 1.0, norm="linf", ascent_steps=40)
    torch.testing.assert_close(found.e, torch.tensor([0.5, -0.2, 1.0], dtype=DOUBLE), rtol=0, atol=1e-3)


RULES = {
    "sam": (steppe.L2(), {}),
    "asam": (steppe.Adaptive(eta=0.01), {"adaptive": True, "eta": 0.01}),
    "asam without eta": (steppe.Adaptive(eta=0.0), {"adaptive": True}),
    "linf": (steppe.LInf(), {"norm": "linf"}),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_the_loss_increase_at_the_perturbed_weights_of_sam(rule):
    perturbation, options = RULES[rule]
    net, (x, y) = tanh_net(), samples()
    found = sharpness(objective(net), 0.1, ascent_steps=1, restarts=1, **options)
    optimizer = steppe.SAM(torch.optim.SGD(net.parameters(), lr=0.0), rho=0.1, perturbation=perturbation)
    losses = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            losses.append(F.cross_entropy(net(x), y))
            losses[-1].backward()
    assert found.one_step == pytest.approx(float((losses[1] - losses[0]).detach()), rel=1e-10)
    assert found.value == found.one_step


def test_first_order_value_is_the_limit_of_small_radii():
    for options in ({}, {"adaptive": True}, {"norm": "linf"}, {"adaptive": True, "norm": "linf"}):
        found = sharpness(objective(tanh_net()), 1e-6, **options)
        assert found.first_order == pytest.approx(found.value, rel=1e-3)


def test_zero_weights_are_perturbed_only_with_eta():
    net = tanh_net()
    with torch.no_grad():
        net[0].weight[0, 0] = net[2].bias[1] = 0.0
    problem = objective(net)
    at_zero = problem.weights == 0
    still, moved = (sharpness(problem, 0.5, adaptive=True, eta=eta) for eta in (0.0, 0.01))
    assert int(at_zero.sum()) == 2
    assert not still.e[at_zero].any()
    assert moved.e[at_zero].all()
    assert 0 < still.value < moved.value < math.inf


def test_rescaling_a_relu_network_changes_sharpness_but_not_adaptive_sharpness():
    plain, other = objective(relu_net()), objective(rescaled(relu_net(), 8.0))
    torch.testing.assert_close(plain.loss(), other.loss())
    assert sharpness(other, 0.3, ascent_steps=5).value > 3 * sharpness(plain, 0.3, ascent_steps=5).value
    for norm in ("l2", "linf"):
        a, b = (sharpness(p, 0.3, adaptive=True, norm=norm) for p in (plain, other))
        for field in ("value", "one_step", "first_order", "restarts"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-9)
    a, b = (sharpness(p, 0.3, adaptive=True, eta=0.1).one_step for p in (plain, other))
    assert a != pytest.approx(b, rel=1e-2), "with eta, not any more"


def test_more_restarts_repeat_the_first_and_never_lower_the_maximum():
    problem = objective(relu_net())
    few, many = (sharpness(problem, 2.0, ascent_steps=5, restarts=k) for k in (2, 6))
    assert many.restarts[:2] == few.restarts
    assert many.value >= few.value
    assert len(set(many.restarts)) == 6


def test_seed_determines_the_random_restarts():
    problem = objective(relu_net())
    runs = [sharpness(problem, 1.0, ascent_steps=5, seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert torch.equal(runs[0].e, runs[1].e)
    assert runs[0].restarts[0] == runs[2].restarts[0]
    assert runs[0].restarts[1] != runs[2].restarts[1]


class StatefulNetwork(nn.Module):
    """Layers with state that a measurement could change, and a parameter without gradient."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_sharpness_leaves_the_model_unchanged(batch_norm):
    torch.manual_seed(0)
    model = StatefulNetwork().double().train()
    x, y = samples()
    F.cross_entropy(model(x), y).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    places, generator = [p.data_ptr() for p in model.parameters()], torch.get_rng_state()

    problem = objective(model, (x, y), batch_norm=batch_norm)
    found = sharpness(problem, 0.5, ascent_steps=3)
    m_sharpness(problem, 0.5, 5, ascent_steps=2, adaptive=True)

    assert found.value > 0
    assert problem.names[0] == "unused"
    assert not found.e[:2].any()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == places
    assert model.training
    assert model.layers[3].training
    assert torch.equal(torch.get_rng_state(), generator)
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None and g is None) or torch.equal(p.grad, g)


def test_float32_perturbation_has_the_norm_rho():
    net = tanh_net().float()
    found = sharpness(objective(net, (samples()[0].float(), samples()[1])), 0.1)
    assert found.e.dtype == torch.float32
    assert float(found.e.double().norm()) == pytest.approx(0.1, rel=1e-6)


def scalar(function, w=0.0):
    """Return the objective of a function of one weight."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([w], dtype=DOUBLE))

        def forward(self, x):
            return function(self.w.sum())

    return Objective(Model(), (torch.zeros(1, 1), torch.zeros(1)), loss=lambda loss, _: loss)


def test_infinite_loss_gives_infinite_sharpness():
    found = sharpness(scalar(lambda w: (1000 * w).exp()), 1.0, restarts=8)
    assert (found.value, found.one_step) == (math.inf, math.inf)
    assert float(found.e) == 1.0
    assert min(found.restarts[1:]) < math.inf, "some begin on the other side"


def test_ascent_ends_at_an_infinite_loss():
    found = sharpness(scalar(lambda w: torch.where(w > 0.5, math.inf - w, w)), 1.0, restarts=1)
    assert (found.value, found.passes) == (math.inf, 2)


def test_loss_of_minus_infinity_is_not_a_maximum():
    found = sharpness(scalar(lambda w: w + torch.where(w > 0.5, -math.inf, 0.0)), 1.0)
    assert found.one_step == -math.inf
    assert 0 < found.value <= 0.5


@pytest.mark.parametrize(
    ("function", "w", "message"),
    [
        (lambda w: torch.where(w > 0.5, math.nan, w), 0.0, "loss is NaN at a perturbed point.*smaller rho.*float64"),
        (lambda w: w / 0, 1.0, "at the weights themselves is inf.*diverged"),
        (lambda w: w * math.nan, 1.0, "at the weights themselves is nan"),
        (lambda w: w.abs().sqrt(), 0.0, "not finite where the loss is finite.*sqrt"),
    ],
)
def test_missing_maximum_raises(function, w, message):
    with pytest.raises(FloatingPointError, match=message):
        sharpness(scalar(function, w), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be finite and more than 0"),
        ({"rho": math.nan}, "rho must be finite and more than 0"),
        ({"norm": "l1"}, "norm='l1': choose"),
        ({"ascent_steps": 0}, "ascent_steps must be 1 or more"),
        ({"restarts": 0}, "restarts must be 1 or more"),
        ({"eta": 0.1}, "eta=0.1 has no effect"),
        ({"eta": -0.1, "adaptive": True}, "eta must be finite and not negative"),
    ],
)
def test_invalid_sharpness_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        sharpness(objective(tanh_net()), **{"rho": 0.1, **options})
