"""The edges of stability of momentum and Adam against steps of torch's optimizers, and Adam's preconditioner."""

import pytest
import torch
from known_hessians import DOUBLE, matrix_with_spectrum, objective, quadratic, samples, tanh_net

import steppe
from steppe.flatness import (
    Hessian,
    Objective,
    Scaled,
    adam_edge_of_stability,
    adam_preconditioner,
    edge_of_stability,
    eigenvalues,
)


def distance_after(optimizer, w, curvature, steps=600):
    """Return |w| after steps on a parabola, whose minimum is 0."""
    for _ in range(steps):
        optimizer.zero_grad()
        (curvature / 2 * w.square().sum()).backward()
        optimizer.step()
    return abs(float(w.detach()))


OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.5},
    {"momentum": 0.9, "dampening": 0.9},
    {"momentum": 0.6, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"dampening": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_descent_converges_below_the_edge_and_diverges_above(options):
    for factor in (0.98, 1.02):
        w = torch.nn.Parameter(torch.ones(1, dtype=DOUBLE))
        edge = edge_of_stability(0.1, **options)
        grown = distance_after(torch.optim.SGD([w], lr=0.1, **options), w, factor * edge) > 1
        assert grown == (factor > 1)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_adam_converges_below_the_edge_and_diverges_above(beta1):
    a = matrix_with_spectrum([0.5, 1.0, 4.0])
    o = quadratic(a, w=torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE))
    (w,) = o.model.parameters()

    def adam(lr):
        optimizer = torch.optim.Adam([w], lr=lr, betas=(beta1, 1 - 1e-15))
        v = torch.tensor([0.3, 2.0, 0.7], dtype=DOUBLE)  # v hardly changes in what follows, so P does not
        state = {"exp_avg": torch.zeros_like(v), "exp_avg_sq": v.clone(), "step": torch.tensor(1e18, dtype=DOUBLE)}
        optimizer.state[w] = state
        return optimizer

    P = adam_preconditioner(adam(1.0), o)
    top = float(eigenvalues(Scaled(Hessian(o), P.rsqrt()), tol=1e-10).values[0])
    exact = torch.linalg.eigvals(a / P[:, None]).real.max()
    assert top == pytest.approx(float(exact), rel=1e-9)
    for factor in (0.98, 1.02):
        lr = factor * adam_edge_of_stability(1.0, beta1=beta1) / top
        with torch.no_grad():
            w.copy_(torch.tensor([1.0, -2.0, 0.5]))
        optimizer = adam(lr)
        for _ in range(3000):
            optimizer.zero_grad()
            o.model(None).backward()
            optimizer.step()
            if (grown := float(w.detach().norm()) > 30) or float(w.detach().norm()) < 1e-3:
                break
        assert grown == (factor > 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.Adam, {}), (torch.optim.Adam, {"amsgrad": True}), (torch.optim.AdamW, {"weight_decay": 0.0})],
    ids=["Adam", "AMSGrad", "AdamW"],
)
def test_preconditioner_is_that_of_the_steps(kind, options):
    net, (x, y) = tanh_net(), samples()
    o = objective(net)
    first, rest = list(net.parameters())[:2], list(net.parameters())[2:]
    groups = [{"params": rest, "eps": 1e-2}, {"params": first, "betas": (0.5, 0.9)}]  # not in the order of the model
    optimizer = kind(groups, lr=0.01, **options)
    for _ in range(3):
        before = o.weights
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        m = o.flatten([optimizer.state[p]["exp_avg"] for p in net.parameters()])
        torch.testing.assert_close(
            o.weights - before, -0.01 * m / adam_preconditioner(optimizer, o), rtol=1e-6, atol=1e-12
        )
    part = adam_preconditioner(optimizer, o.restrict_to(["4.bias"]))
    assert torch.equal(part, adam_preconditioner(optimizer, o)[-3:])


def test_preconditioner_of_a_base_optimizer_of_sam():
    net, (x, y) = tanh_net(), samples()
    base = torch.optim.AdamW(net.parameters(), lr=0.01)
    optimizer = steppe.SAM(base, rho=0.05)
    for sam_pass in optimizer.passes():
        with sam_pass:
            torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    assert torch.equal(adam_preconditioner(optimizer, objective(net)), adam_preconditioner(base, objective(net)))


def test_optimizers_without_the_state_of_adam_raise():
    net = tanh_net()
    o = objective(net)
    for optimizer in (torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam(net.parameters())):
        with pytest.raises(ValueError, match=r"0.weight has no state of Adam \(exp_avg_sq\)"):
            adam_preconditioner(optimizer, o)
    other = torch.optim.Adam(tanh_net().parameters())
    with pytest.raises(ValueError, match="has no state of Adam"):
        adam_preconditioner(other, o)


def test_preconditioner_with_zeros_raises():
    w = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adam(w.parameters(), eps=0.0)
    w.weight.grad = torch.zeros_like(w.weight)
    optimizer.step()
    with pytest.raises(ValueError, match="is 0 in some entries"):
        adam_preconditioner(
            optimizer, Objective(w, (torch.ones(1, 1), torch.ones(1, 1)), loss=torch.nn.functional.mse_loss)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be at least 0 and less than 1, got 1.0"),
        ({"momentum": 0.9, "dampening": float("nan")}, "dampening must be at least 0 and less than 1, got nan"),
        ({"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "without dampening only"),
    ],
)
def test_invalid_momentum_raises(options, message):
    with pytest.raises(ValueError, match=message):
        edge_of_stability(0.1, **options)
    if "momentum=1" in message:
        with pytest.raises(ValueError, match="beta1 must be at least 0 and less than 1"):
            adam_edge_of_stability(0.1, beta1=1.0)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.parametrize("wrap", [lambda base: base, steppe.SAM])
def test_other_optimizers_with_state_of_the_same_names_are_refused(kind, wrap):
    net = tanh_net()
    optimizer = wrap(kind(net.parameters(), lr=0.01))
    with pytest.raises(ValueError, match=f"the optimizer is {kind.__name__}, whose step is not"):
        adam_preconditioner(optimizer, objective(net))
