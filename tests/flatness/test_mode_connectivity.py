"""Curves between two models against a slow reference, and between two copies of one network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    DOUBLE,
    FailingLoss,
    conv_net,
    image_objective,
    images,
    objective_of,
    point_objective,
    relu_net,
    unchanged,
)
from torch import nn
from torch.func import functional_call

from steppe._tensors import random as random_tensors
from steppe.flatness import Objective, connect, interpolation


def trained(hidden=12, steps=100):
    """Return a network trained to classify by the largest of three linear functions, and its objective."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3)).double()
    x = torch.randn(30, 4, dtype=DOUBLE)
    y = (x @ torch.randn(4, 3, dtype=DOUBLE)).argmax(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, Objective(net, (x, y), loss=F.cross_entropy, batch_size=7)


def permuted(net):
    """Return the network with its hidden units in reverse order: the same function."""
    other, order = copy.deepcopy(net), torch.arange(len(net[0].weight)).flip(0)
    with torch.no_grad():
        other[0].weight.copy_(net[0].weight[order])
        other[0].bias.copy_(net[0].bias[order])
        other[2].weight.copy_(net[2].weight[:, order])
    return other


def test_curve_of_low_loss_connects_two_copies_with_permuted_units():
    net, objective = trained()
    other = permuted(net)
    line = interpolation(objective, other)
    torch.testing.assert_close(line.losses[0], line.losses[-1], rtol=1e-12, atol=0)
    assert line.barrier > 0.25
    straight, curve = connect(objective, other, total_steps=0), connect(objective, other, total_steps=300, lr=0.03)
    assert straight.barrier == pytest.approx(line.barrier, rel=1e-10)
    assert curve.barrier < 0.1 * line.barrier
    assert curve.barrier == curve.losses().barrier
    assert curve.length > straight.length


def slow_reference(net, other, steps, lr, seed, train):
    """Train theta by autograd through phi(t), in the paper's notation, on one batch per step in turn."""
    w1, w2 = nn.utils.parameters_to_vector(net.parameters()), nn.utils.parameters_to_vector(other.parameters())
    theta = nn.Parameter((w1 + w2).detach() / 2)
    x, y = images()
    batches = list(zip(x.split(4), y.split(4), strict=True))
    optimizer = torch.optim.Adam([theta], lr)
    net = copy.deepcopy(net)
    for m in net:
        m.train(train and isinstance(m, nn.BatchNorm2d))
    for step in range(steps):
        t = random_tensors.uniform("connect", seed, step, [torch.empty(())])[0].double()
        phi = (1 - t) ** 2 * w1.detach() + 2 * t * (1 - t) * theta + t**2 * w2.detach()
        parts = phi.split([p.numel() for p in net.parameters()])
        named = {k: v.view(p.shape) for (k, p), v in zip(net.named_parameters(), parts, strict=True)}
        x, y = batches[step % 3]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(functional_call(net, named, (x,)), y).backward()
        optimizer.step()
    return theta.detach()


def test_bend_equals_the_slow_reference():
    net, other = conv_net(0), conv_net(1)
    bend = connect(image_objective(net), other, total_steps=8, lr=0.05, seed=3).bend
    # atol: a bias before BatchNorm has no gradient but rounding, which Adam divides by its eps = 1e-8
    torch.testing.assert_close(bend, slow_reference(net, other, 8, 0.05, 3, True), rtol=1e-9, atol=1e-8)
    # other arguments give another bend
    for wrong in ((8, 0.05, 4, True), (7, 0.05, 3, True), (8, 0.05, 3, False)):
        assert (slow_reference(net, other, *wrong) - bend).abs().max() > 1e-3


def test_curve_is_a_parabola_between_both_models():
    net, other = conv_net(0, torch.float32), conv_net(1, torch.float32)
    with torch.no_grad():
        net[7].weight.mul_(1000.0)
    objective, there = image_objective(net), image_objective(other)
    curve = connect(objective, other, total_steps=3, lr=0.1)
    assert torch.equal(curve(0.0), objective.weights)
    assert torch.equal(curve(1.0), there.weights)
    w1, theta, w2 = (v.double() for v in (objective.weights, curve.bend, there.weights))
    want = [0.49 * w1 + 0.42 * theta + 0.09 * w2, 0.25 * w1 + 0.5 * theta + 0.25 * w2]
    for t, phi in zip((0.3, 0.5), want, strict=True):
        torch.testing.assert_close(curve(t).double(), phi, rtol=1e-5, atol=1e-4)
    own = curve.losses(3, statistics=False)
    assert (own.losses[0], own.losses[-1]) == (objective.loss(), there.loss())


def test_length_of_curve():
    def length(*corners):
        start, bend, end = (torch.tensor(c, dtype=DOUBLE) for c in corners)
        curve = connect(objective_of(lambda w: (w**2).sum(), start), end, total_steps=0)
        curve.bend.copy_(bend)
        return curve.length

    t = torch.linspace(0, 1, 100_001, dtype=DOUBLE)
    phi = torch.stack([2 * t * (1 - t) + t**2, t**2])  # around the corner of a square
    polygon = float(phi.diff(dim=1).norm(dim=0).sum())
    assert length((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)) == pytest.approx(polygon, rel=1e-7)
    assert length((1.0, 2.0), (2.5, 4.0), (4.0, 6.0)) == pytest.approx(5.0, rel=1e-12)
    assert length((1.0, 2.0), (2.5, 4.0), (1.0, 2.0)) == pytest.approx(2.5, rel=1e-6)  # there and back
    assert length((1.0, 2.0), (1.0, 2.0), (1.0, 2.0)) == 0


def test_statistics_are_reestimated_along_the_curve():
    net, other = conv_net(0), conv_net(1)
    objective = image_objective(net)
    curve = connect(objective, other, total_steps=0)
    line = interpolation(objective, other, points=5, statistics=True)
    found = curve.losses(5)
    assert found.statistics
    assert torch.equal(found.axis, line.axis)
    torch.testing.assert_close(found.losses, line.losses, rtol=1e-10, atol=0)
    vector = connect(objective, image_objective(other).weights, total_steps=0)
    assert torch.equal(vector.losses(5).losses, found.losses)
    with pytest.raises(ValueError, match="without the running statistics"):
        vector.losses(statistics=False)


def test_connect_leaves_models_unchanged_even_after_an_error():
    net, other = conv_net(0), conv_net(1)
    with unchanged(net, other):
        first, second = (connect(image_objective(net), other, total_steps=7) for _ in range(2))
        first.losses(3)
        assert torch.equal(first.bend, second.bend)
        broken = Objective(net, images(), loss=FailingLoss(5), batch_size=4)
        with pytest.raises(ArithmeticError, match="on purpose"):
            connect(broken, other)


def test_nonfinite_gradient_raises():
    objective = objective_of(lambda w: w.sum().abs().sqrt() * math.nan, torch.ones(2, dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"step 1 of 10: the gradient at t = 0\.\d+ is not finite"):
        connect(objective, torch.zeros(2, dtype=DOUBLE), total_steps=10)


def test_invalid_connect_arguments_raise():
    objective = point_objective(relu_net())
    for wrong in ({"total_steps": -1}, {"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}):
        with pytest.raises(ValueError, match="(lr|total_steps) must be"):
            connect(objective, relu_net(1), **wrong)
    with pytest.raises(ValueError, match="a curve needs its two ends"):
        connect(objective, relu_net(1), total_steps=0).losses(1)
    with pytest.raises(ValueError, match="Weights can be interpolated only"):
        connect(objective, conv_net())
    with pytest.raises(ValueError, match="there are no samples"):
        connect(Objective(relu_net(), [], loss=F.cross_entropy), relu_net(1))
