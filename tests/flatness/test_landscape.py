"""Landscapes and lines: every entry is the loss where it says it is, and nothing is made up or moved."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from solutions import (
    DOUBLE,
    Breaks,
    conv_net,
    formula,
    images,
    on_images,
    on_points,
    relu_net,
    untouched,
)
from torch import nn

from steppe.flatness import Objective
from steppe.flatness.directions import random_directions
from steppe.flatness.landscape import Landscape, Line, interpolation, landscape


def test_along_eigenvectors_the_landscape_of_a_quadratic_is_the_quadratic():
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE))
    values, b, w = (
        torch.tensor([7.0, -2.0, 1.0, 0.5, 0.1], dtype=DOUBLE),
        torch.randn(5).double(),
        torch.randn(5).double(),
    )
    a = q @ values.diag() @ q.T
    objective = formula(lambda w: 0.5 * w @ a @ w + b @ w, w.clone())
    found = landscape(objective, q.T[:2], axis=[-0.5, 0.0, 1.0, 3.0])
    s, t = torch.meshgrid(found.axis, found.axis, indexing="ij")
    start, slope = 0.5 * w @ a @ w + b @ w, (a @ w + b) @ q
    want = start + slope[0] * s + slope[1] * t + 0.5 * (7 * s**2 - 2 * t**2)
    torch.testing.assert_close(found.losses, want, rtol=1e-12, atol=1e-12)


def test_every_entry_is_the_loss_at_its_own_place():
    objective = on_points(relu_net())
    d1, d2 = random_directions(objective)
    center = torch.full_like(d1, 0.1)
    surface = landscape(objective, torch.stack([d1, d2]), radius=0.7, points=5, center=center)
    profile = landscape(objective, d2[None], radius=0.7, points=5)
    for i, a in enumerate(surface.axis.tolist()):
        assert profile.losses[i] == objective.loss(a * d2)
        for j, b in enumerate(surface.axis.tolist()):
            assert surface.losses[i][j] == objective.loss(center + (a * d1 + b * d2))
    assert surface.center == objective.loss(center) == surface.losses[2, 2]
    assert surface.losses.unique().numel() == 25


def test_the_middle_is_the_models_own_loss_to_the_bit():
    model = conv_net(dtype=torch.float32)
    objective = on_images(model)
    with untouched(model):
        for d in (random_directions(objective), random_directions(objective, 1)):
            for p in (3, 7):
                found = landscape(objective, d, points=p, radius=0.3)
                middle = (p // 2,) * len(d)
                assert found.axis[p // 2] == 0
                assert found.losses[middle] == found.center == float(objective.loss())
                assert torch.equal(found.axis, -found.axis.flip(0))
                assert found.axis[-1] == 0.3
    even = landscape(objective, random_directions(objective, 1), points=4, radius=3.0)
    torch.testing.assert_close(even.axis, torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=DOUBLE))
    assert even.center == float(objective.loss())


def test_one_pass_a_point():
    told = []
    objective = on_points(relu_net(), progress=lambda stage, passes: told.append((stage, passes)))
    landscape(objective, random_directions(objective), points=3)
    interpolation(objective, relu_net(1), points=4)
    assert told == [("landscape", i) for i in range(1, 10)] + [("interpolation", i) for i in range(10, 14)]


def test_what_is_not_finite_stays_what_and_where_it_is():
    wall, top = torch.tensor(math.nan, dtype=DOUBLE), torch.tensor(math.inf, dtype=DOUBLE)

    def of(w):
        return wall if w[0] > 0.6 else top if w[1] > 0.6 else w[0] + 10 * w[1]

    objective = formula(of, torch.zeros(2, dtype=DOUBLE))
    found = landscape(objective, torch.eye(2, dtype=DOUBLE), points=3, what="the coordinates")
    want = [[-11, -1, math.inf], [-10, 0, math.inf], [math.nan] * 3]
    torch.testing.assert_close(found.losses, torch.tensor(want, dtype=DOUBLE), equal_nan=True)
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["losses"] == [[-11, -1, None], [-10, 0, None], [None] * 3]
    read = Landscape.from_json(written)
    assert read.losses.dtype == read.axis.dtype == DOUBLE
    assert read.to_json() == written
    assert torch.equal(read.losses.isnan(), ~found.losses.isfinite())

    line = interpolation(objective, torch.tensor([0.0, 1.0], dtype=DOUBLE), points=3)
    assert line.losses.tolist() == [0, 5, math.inf]
    assert Line.from_json(line.to_json()).losses[:2].tolist() == [0, 5]
    assert math.isnan(interpolation(objective, torch.tensor([2.0, -1.0], dtype=DOUBLE), points=5).barrier)


def rescale_layers(net):
    """The first layer by 8, the last by 1/8: with a ReLU between them, the same function."""
    with torch.no_grad():
        net[0].weight.mul_(8)
        net[0].bias.mul_(8)
        net[2].weight.div_(8)


def rescale_filters(net):
    """Each filter before a BatchNorm by a factor of its own, and the statistics with it: the same function."""
    factors = torch.tensor([8.0, 0.25, 2.0], dtype=DOUBLE)
    with torch.no_grad():
        net[0].weight.mul_(factors.view(3, 1, 1, 1))
        net[1].running_mean.mul_(factors)
        net[1].running_var.mul_(factors**2)


@pytest.mark.parametrize(
    ("make", "on", "rescale", "unmoved_by_layers"),
    [(relu_net, on_points, rescale_layers, True), (conv_net, on_images, rescale_filters, False)],
)
def test_rescaling_a_network_leaves_its_landscape_as_it_is(make, on, rescale, unmoved_by_layers):
    def looks(net, normalize):
        for m in net:
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 1e-200  # which is not rescaled
        objective = on(net)
        return landscape(objective, random_directions(objective, seed=5, normalize=normalize), points=3).losses

    before, after = make(), make()
    rescale(after)
    torch.testing.assert_close(looks(after, "filter"), looks(before, "filter"), rtol=1e-12, atol=0)
    layers = (looks(after, "layer") / looks(before, "layer") - 1).abs().max()
    plain = (looks(after, None) / looks(before, None) - 1).abs().max()
    assert plain > 0.1
    assert (layers < 1e-12) if unmoved_by_layers else (layers > 0.1)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("statistics", [False, True])
def test_nothing_happens_to_the_models_even_when_one_breaks(batch_norm, statistics):
    model, other = conv_net(0), conv_net(1)
    with untouched(model, other):
        objective = on_images(model, batch_norm=batch_norm)
        d = random_directions(objective)
        landscape(objective, d, points=3, statistics=statistics)
        interpolation(objective, other, points=3, extend=0.5, statistics=statistics)
        for measure in (lambda o: landscape(o, d, statistics=statistics), lambda o: interpolation(o, other)):
            broken = Objective(model, images(), loss=Breaks(8), batch_size=4, batch_norm=batch_norm)
            with pytest.raises(ArithmeticError, match="on purpose"):
                measure(broken)


def evaluated(net):
    net.eval()
    with torch.no_grad():
        x, y = images(next(net.parameters()).dtype)
        return F.cross_entropy(net(x), y)


def estimated(net):
    """With BatchNorm's statistics as the mean of those of the three batches."""
    net.train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
        if isinstance(m, nn.Dropout):
            m.eval()
    with torch.no_grad():
        for x in images()[0].split(4):
            net(x)
    return evaluated(net)


def test_statistics_are_estimated_anew_at_each_point():
    model = conv_net()
    objective = on_images(model)
    (d,) = random_directions(objective, 1)
    found = landscape(objective, d[None], points=3, statistics=True)
    for t, loss in zip(found.axis.tolist(), found.losses, strict=True):
        there = copy.deepcopy(model)
        nn.utils.vector_to_parameters(objective.weights + t * d, there.parameters())
        torch.testing.assert_close(loss, estimated(there), rtol=1e-12, atol=0)
    assert found.statistics
    assert found.center == found.losses[1] != objective.loss()
    assert not landscape(on_points(relu_net()), torch.ones(1, 51), points=3, statistics=True).statistics


def lerped(a, b, t, buffers_at):
    there, x, y = copy.deepcopy(a), a.state_dict(), b.state_dict()
    parameters = dict(a.named_parameters())
    steps = {k: t if k in parameters else buffers_at for k in x}
    there.load_state_dict({k: x[k] + s * (y[k] - x[k]) if x[k].is_floating_point() else x[k] for k, s in steps.items()})
    return there


@pytest.mark.parametrize("statistics", [False, True])
def test_on_the_line_between_two_solutions(statistics):
    a, b = conv_net(0), conv_net(1)
    of = estimated if statistics else evaluated
    line = interpolation(on_images(a), b, points=5, extend=0.25, statistics=statistics)
    assert line.axis.tolist() == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert line.statistics == statistics
    for t, loss in zip(line.axis.tolist(), line.losses, strict=True):
        torch.testing.assert_close(loss, of(lerped(a, b, t, min(max(t, 0.0), 1.0))), rtol=1e-10, atol=0)
    inside = line.losses[1:-1]
    above = [x - ((1 - t) * inside[0] + t * inside[-1]) for t, x in zip((0, 0.25, 0.5, 0.75, 1), inside, strict=True)]
    assert line.barrier == pytest.approx(max(map(float, above)), rel=1e-12)


@pytest.mark.parametrize("given", [lambda net: net, nn.Module.state_dict])
def test_at_its_ends_a_line_has_the_solutions_own_losses_to_the_bit(given):
    # in float32 w + (w' - w) is often not w'; and each model has its own number of batches, and own statistics
    a, b = conv_net(0, torch.float32), conv_net(1, torch.float32)
    b[1].num_batches_tracked += 5
    with torch.no_grad():
        a[7].weight.mul_(1000.0)
    objective = on_images(a)
    line = interpolation(objective, given(b), points=3)
    assert line.losses[0] == objective.loss()
    assert line.losses[-1] == on_images(b).loss()
    w, there = objective.weights, on_images(b).weights
    assert not torch.equal(w + (there - w), there)


class Masked(nn.Linear):
    """A layer of which only some weights count."""

    def __init__(self, *kept: bool) -> None:
        super().__init__(4, 1, bias=False, dtype=DOUBLE)
        self.register_buffer("kept", torch.tensor(kept))

    def forward(self, x):
        return F.linear(x, self.weight * self.kept)


def test_a_buffer_of_whole_numbers_is_the_nearer_ends():
    a, b = Masked(True, True, False, False), Masked(False, True, True, False)
    data, (way,) = (torch.eye(4, dtype=DOUBLE), torch.ones(4, 1, dtype=DOUBLE)), b.weight - a.weight
    line = interpolation(Objective(a, data, loss=F.mse_loss), b, points=4)
    for t, loss, kept in zip(line.axis.tolist(), line.losses, (a.kept, a.kept, b.kept, b.kept), strict=True):
        want = ((a.weight[0] + t * way) * kept - 1).square().mean().detach()
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)


def test_a_vector_has_no_running_statistics():
    a, b = conv_net(0), conv_net(1)
    objective, vector = on_images(a), on_images(b).weights
    with pytest.raises(ValueError, match="other is a vector, and without the running statistics"):
        interpolation(objective, vector)
    by_model = interpolation(objective, b, points=3, statistics=True)
    assert torch.equal(interpolation(objective, vector, points=3, statistics=True).losses, by_model.losses)


def test_barriers():
    def barrier(*losses):
        axis = torch.linspace(-0.5, 1.5, len(losses), dtype=DOUBLE)
        return Line(axis, torch.tensor(losses, dtype=DOUBLE), False).barrier

    assert barrier(9, 1, 2, 3, 9) == 0  # straight, and what lies beyond the ends does not count
    assert barrier(9, 1, 5, 3, 9) == 3
    assert barrier(9, 3, -1, 1, 9) == 0
    assert barrier(0, 1, math.inf, 3, 0) == math.inf
    assert math.isnan(barrier(0, 1, math.nan, 3, 0))


def test_what_cannot_be_measured():
    objective = on_points(relu_net())
    d = random_directions(objective)
    for wrong in (d[0], d.repeat(2, 1), d[:, 1:]):
        with pytest.raises(ValueError, match=r"one direction is \(1, 51\) here"):
            landscape(objective, wrong)
    with pytest.raises(ValueError, match="some entries are not finite"):
        landscape(objective, d / 0.0)
    with pytest.raises(ValueError, match=r"shape \(1,\) was given"):
        landscape(objective, d, center=torch.zeros(1))
    for wrong in (
        {"points": 1},
        {"radius": 0.0},
        {"radius": math.nan},
        {"axis": [0.0, math.inf]},
        {"axis": [[0.0]]},
        {"axis": []},
    ):
        with pytest.raises(ValueError, match="needed"):
            landscape(objective, d, **wrong)
    for wrong in ({"points": 1}, {"extend": -0.1}, {"extend": math.inf}):
        with pytest.raises(ValueError, match="a line needs its two ends"):
            interpolation(objective, relu_net(1), **wrong)
    assert objective.passes == 0
