"""Sharpness against exact maxima over the ball, SAM's own steps, and rescalings that change nothing."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracles import DOUBLE, objective, quadratic, relu_net, rescaled, samples, tanh_net, with_spectrum
from torch import nn

import steppe
from steppe.flatness import Estimate, Objective
from steppe.flatness.sharpness import m_sharpness, sharpness


def highest(a, b, rho):
    """The exact maximum of 1/2 z'Az + b'z over |z| <= rho: (mu - A) z = b with mu >= lambda_max, mu >= 0."""
    values, q = torch.linalg.eigh(a)
    c, top = q.T @ b, float(values[-1])

    def rise(z):
        return float((values * z.square() / 2 + c * z).sum())

    if top < 0 and (c / values).norm() <= rho:
        return rise(-c / values)  # inside
    at_top = (values - top).abs() < 1e-9
    if top >= 0 and c[at_top].norm() < 1e-12:  # the hard case: z may need a part along the top
        z = torch.where(at_top, 0.0, c / (top - values + at_top))
        if z.norm() <= rho:
            z[-1] = (rho**2 - z.norm() ** 2).sqrt()
            return rise(z)
    low, high = max(top, 0.0), max(top, 0.0) + float(c.norm()) / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (c / (mu - values)).norm() > rho else (low, mu)
    return rise(c / (high - values))


def random_b(length, n, seed=5):
    b = torch.randn(n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return b * length / b.norm()


SPECTRA = {
    "convex": torch.linspace(0.0, 1.0, 30).tolist(),
    "outliers": [*torch.linspace(0.0, 0.2, 26).tolist(), 1.0, 3.0, 5.0, 10.0],
    "indefinite": torch.linspace(-1.0, 1.0, 30).tolist(),
    "mostly downward": [-10.0, -5.0, *torch.linspace(-1.0, 0.5, 28).tolist()],
    "concave": [-x for x in torch.logspace(-1, 1, 30).tolist()],
}


@pytest.mark.parametrize("slope", [10.0, 1.0, 0.1])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_quadratics_are_climbed_to_their_exact_maximum_in_the_ball(spectrum, slope):
    a, b = with_spectrum(SPECTRA[spectrum]), random_b(slope, 30)
    exact = highest(a, b, 0.7)
    found = sharpness(quadratic(a, b), 0.7, restarts=3)
    assert 0.96 * exact < found.value <= exact * (1 + 1e-9)
    assert sharpness(quadratic(a, b), 0.7, restarts=3, steps=100).value > 0.999 * exact


def test_what_is_found_is_where_it_says():
    for rho, norm, adaptive in itertools.product([0.1, 1.0], ["l2", "linf"], [False, True]):
        problem = objective(tanh_net())
        found = sharpness(problem, rho, norm=norm, steps=6, restarts=3, adaptive=adaptive)
        z = found.e / problem.weights.abs() if adaptive else found.e
        assert float(torch.linalg.vector_norm(z, 2 if norm == "l2" else math.inf)) <= rho * (1 + 1e-12)
        there = float(problem.loss(found.e) - problem.loss())
        assert found.value == pytest.approx(there, rel=1e-12)
        assert found.value == max(found.restarts) >= found.restarts[0] >= found.one_step
        assert found.loss == float(problem.loss())


def test_every_pass_is_counted_and_none_is_made_twice():
    problem = objective(tanh_net())
    found = sharpness(problem, 0.5, steps=4, restarts=3)
    assert found.passes == problem.passes == 1 + 4 * 3
    assert sharpness(problem, 0.5, steps=1, restarts=1).passes == 2


def test_where_the_top_has_no_slope_only_random_restarts_find_it():
    a = with_spectrum([-1.0, 0.2, 0.5, 4.0])
    _, q = torch.linalg.eigh(a)
    b = 0.1 * (q[:, 0] + q[:, 1] + q[:, 2])  # orthogonal to the top
    exact = highest(a, b, 1.0)
    assert sharpness(quadratic(a, b), 1.0, restarts=1, steps=10).value < 0.4 * exact
    assert exact * 0.9999 < sharpness(quadratic(a, b), 1.0).value <= exact * (1 + 1e-9)


def test_at_a_minimum_half_the_top_eigenvalue_times_rho_squared():
    found = sharpness(quadratic(with_spectrum([0.1, 1.0, 6.0])), 0.5)
    assert found.value == pytest.approx(0.5 * 6.0 * 0.25, rel=1e-6)
    assert (found.one_step, found.first_order, found.restarts[0], found.gradient_norm) == (0, 0, 0, 0)


def test_at_a_maximum_nothing_rises():
    found = sharpness(quadratic(with_spectrum([-2.0, -1.0]), random_b(1e-9, 2)), 0.5, steps=3)
    assert 0 <= found.value < 1e-15
    assert found.one_step < -0.1
    assert found.e.norm() < 1e-6


def test_linf_finds_the_best_corner():
    a, b = with_spectrum([0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 2.5, 3.0]), random_b(0.5, 8)
    corners = 0.3 * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=DOUBLE)
    exact = float((((corners @ a) * corners).sum(1) / 2 + corners @ b).max())  # convex: the maximum is in one
    found = sharpness(quadratic(a, b), 0.3, norm="linf", restarts=30)
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert found.first_order == pytest.approx(0.3 * float(b.abs().sum()))


def test_linf_goes_to_the_top_inside_the_box_where_there_is_one():
    a, target = torch.diag(torch.tensor([-1.0, -4.0, -9.0], dtype=DOUBLE)), torch.tensor([0.5, -0.2, 3.0], dtype=DOUBLE)
    found = sharpness(quadratic(a, -a @ target), 1.0, norm="linf", steps=40)
    torch.testing.assert_close(found.e, torch.tensor([0.5, -0.2, 1.0], dtype=DOUBLE), rtol=0, atol=1e-3)


RULES = {
    "sam": (steppe.L2(), {}),
    "asam": (steppe.Adaptive(eta=0.01), {"adaptive": True, "eta": 0.01}),
    "asam without eta": (steppe.Adaptive(eta=0.0), {"adaptive": True}),
    "linf": (steppe.LInf(), {"norm": "linf"}),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_one_step_point_is_where_the_optimizer_climbs(rule):
    perturbation, options = RULES[rule]
    net, (x, y) = tanh_net(), samples()
    found = sharpness(objective(net), 0.1, steps=1, restarts=1, **options)
    optimizer = steppe.SAM(torch.optim.SGD(net.parameters(), lr=0.0), rho=0.1, perturbation=perturbation)
    losses = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            losses.append(F.cross_entropy(net(x), y))
            losses[-1].backward()
    assert found.one_step == pytest.approx(float((losses[1] - losses[0]).detach()), rel=1e-10)
    assert found.value == found.one_step


def test_the_first_order_value_is_the_slope_of_small_radii():
    for options in ({}, {"adaptive": True}, {"norm": "linf"}, {"adaptive": True, "norm": "linf"}):
        found = sharpness(objective(tanh_net()), 1e-6, **options)
        assert found.first_order == pytest.approx(found.value, rel=1e-3)


def test_a_weight_at_zero_is_harmless_and_moves_with_eta_only():
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


def test_rescaling_a_relu_network_changes_sharpness_and_not_adaptive_sharpness():
    plain, other = objective(relu_net()), objective(rescaled(relu_net(), 8.0))
    torch.testing.assert_close(plain.loss(), other.loss())
    assert sharpness(other, 0.3, steps=5).value > 3 * sharpness(plain, 0.3, steps=5).value
    for norm in ("l2", "linf"):
        a, b = (sharpness(p, 0.3, adaptive=True, norm=norm) for p in (plain, other))
        for field in ("value", "one_step", "first_order", "restarts"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-9)
    a, b = (sharpness(p, 0.3, adaptive=True, eta=0.1).one_step for p in (plain, other))
    assert a != pytest.approx(b, rel=1e-2), "with eta, not any more"


def test_more_restarts_are_never_worse_and_begin_with_the_same():
    problem = objective(relu_net())
    few, many = (sharpness(problem, 2.0, steps=5, restarts=k) for k in (2, 6))
    assert many.restarts[:2] == few.restarts
    assert many.value >= few.value
    assert len(set(many.restarts)) == 6


def test_the_seed_decides():
    problem = objective(relu_net())
    runs = [sharpness(problem, 1.0, steps=5, seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert torch.equal(runs[0].e, runs[1].e)
    assert runs[0].restarts[0] == runs[2].restarts[0]
    assert runs[0].restarts[1] != runs[2].restarts[1]


# m-sharpness


class Line(nn.Module):
    """A linear regression, whose every sample has a quadratic of its own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=DOUBLE))

    def forward(self, x):
        return x @ self.w


def line(n=7, batch_size=100):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(n, 3, dtype=DOUBLE, generator=generator), torch.randn(n, dtype=DOUBLE, generator=generator)
    return x, y, Objective(Line(), (x, y), loss=F.mse_loss, batch_size=batch_size)


def exact_line(x, y, rho):
    return highest(2 * x.T @ x / len(x), 2 * x.T @ (x @ Line().w.detach() - y) / len(x), rho)


def test_m_sharpness_is_the_mean_of_the_parts_own_exact_maxima():
    x, y, problem = line()
    found = m_sharpness(problem, 0.4, 3, steps=100)
    own = torch.tensor([exact_line(a, b, 0.4) for a, b in zip(x.split(3), y.split(3), strict=True)], dtype=DOUBLE)
    sizes = torch.tensor([3.0, 3.0, 1.0], dtype=DOUBLE) / 7
    mean = (own * sizes).sum()
    assert found.value == pytest.approx(float(mean), rel=1e-6)
    assert found.error == pytest.approx(float(((sizes * (own - mean)).square().sum() * 3 / 2).sqrt()), rel=1e-4)
    assert (found.n, found.samples) == (3, 7)
    assert found.value > exact_line(x, y, 0.4)


def test_parts_of_one_size_have_the_usual_standard_error():
    x, y, problem = line(6)
    found = m_sharpness(problem, 0.4, 2, steps=1, restarts=1)
    parts = [Objective(Line(), part, loss=F.mse_loss) for part in zip(x.split(2), y.split(2), strict=True)]
    usual = Estimate.of([sharpness(part, 0.4, steps=1).one_step for part in parts])
    assert (found.one_step.value, found.one_step.error) == pytest.approx((usual.value, usual.error), rel=1e-12)
    assert (found.value, found.error) == (found.one_step.value, found.one_step.error)


def test_all_samples_in_one_part_is_sharpness():
    problem = objective(tanh_net())
    for options in ({}, {"adaptive": True, "eta": 0.1}, {"norm": "linf", "seed": 3}):
        found, whole = m_sharpness(problem, 0.2, 20, **options), sharpness(problem, 0.2, **options)
        assert (found.value, found.one_step.value) == (whole.value, whole.one_step)
        assert math.isnan(found.error)


def test_the_first_parts_only():
    x, y, problem = line()
    found = m_sharpness(problem, 0.4, 2, parts=2)
    first = Objective(Line(), (x[:4], y[:4]), loss=F.mse_loss)
    assert found == m_sharpness(first, 0.4, 2)


# What must not happen


class Careless(nn.Module):
    """All that a measurement could spoil, and a parameter that it has no use for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_nothing_of_the_model_is_changed(batch_norm):
    torch.manual_seed(0)
    model = Careless().double().train()
    x, y = samples()
    F.cross_entropy(model(x), y).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    places, generator = [p.data_ptr() for p in model.parameters()], torch.get_rng_state()

    problem = objective(model, (x, y), batch_norm=batch_norm)
    found = sharpness(problem, 0.5, steps=3)
    m_sharpness(problem, 0.5, 5, steps=2, adaptive=True)

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


def test_float32_weights_at_half_precision_size_stay_in_the_ball():
    net = tanh_net().float()
    found = sharpness(objective(net, (samples()[0].float(), samples()[1])), 0.1)
    assert found.e.dtype == torch.float32
    assert float(found.e.double().norm()) == pytest.approx(0.1, rel=1e-6)


def scalar(function, w=0.0):
    """A function of one weight, as the loss of a model."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([w], dtype=DOUBLE))

        def forward(self, x):
            return function(self.w.sum())

    return Objective(Model(), (torch.zeros(1, 1), torch.zeros(1)), loss=lambda loss, _: loss)


def test_an_infinite_loss_is_infinite():
    found = sharpness(scalar(lambda w: (1000 * w).exp()), 1.0, restarts=8)
    assert (found.value, found.one_step) == (math.inf, math.inf)
    assert float(found.e) == 1.0
    assert min(found.restarts[1:]) < math.inf, "some begin on the other side"


def test_above_an_infinite_loss_nobody_climbs():
    found = sharpness(scalar(lambda w: torch.where(w > 0.5, math.inf - w, w)), 1.0, restarts=1)
    assert (found.value, found.passes) == (math.inf, 2)


def test_minus_infinity_is_not_high():
    found = sharpness(scalar(lambda w: w + torch.where(w > 0.5, -math.inf, 0.0)), 1.0)
    assert found.one_step == -math.inf
    assert 0 < found.value <= 0.5


@pytest.mark.parametrize(
    ("function", "w", "message"),
    [
        (lambda w: torch.where(w > 0.5, math.nan, w), 0.0, "loss is NaN at a place near.*smaller rho.*float64"),
        (lambda w: w / 0, 1.0, "at the weights themselves is inf.*diverged"),
        (lambda w: w * math.nan, 1.0, "at the weights themselves is nan"),
        (lambda w: w.abs().sqrt(), 0.0, "not finite where the loss is finite.*sqrt"),
    ],
)
def test_where_there_is_no_maximum_it_is_said(function, w, message):
    with pytest.raises(FloatingPointError, match=message):
        sharpness(scalar(function, w), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be positive"),
        ({"rho": math.nan}, "rho must be positive"),
        ({"norm": "l1"}, "norm='l1': choose"),
        ({"steps": 0}, "steps=0, restarts=5: a climb needs"),
        ({"restarts": 0}, "restarts=0"),
        ({"eta": 0.1}, "eta=0.1 has no effect"),
        ({"eta": -0.1, "adaptive": True}, "eta must be finite and not negative"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sharpness(objective(tanh_net()), **{"rho": 0.1, **options})


@pytest.mark.parametrize(
    ("m", "options", "message"),
    [
        (0, {}, "m=0: a part needs"),
        (9, {}, r"m=9, and a batch has 8 samples: .*batch_size="),
        (2, {"parts": 0}, "parts=0: a mean needs"),
    ],
)
def test_what_makes_no_sense_of_parts_is_refused(m, options, message):
    with pytest.raises(ValueError, match=message):
        m_sharpness(objective(tanh_net(), batch_size=8), 0.1, m, **options)
