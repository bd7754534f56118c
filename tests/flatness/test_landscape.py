"""Landscapes: every entry is the loss at its grid point, and losses that are not finite are kept."""

import copy
import json
import math

import pytest
import torch
from small_networks import (
    DOUBLE,
    FailingLoss,
    conv_net,
    estimated,
    image_objective,
    images,
    objective_of,
    point_objective,
    relu_net,
    unchanged,
)
from torch import nn

from steppe.flatness import Landscape, Line, Objective, interpolation, landscape, random_directions


def test_landscape_of_a_quadratic_along_eigenvectors_is_exact():
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE))
    values, b, w = (
        torch.tensor([7.0, -2.0, 1.0, 0.5, 0.1], dtype=DOUBLE),
        torch.randn(5).double(),
        torch.randn(5).double(),
    )
    a = q @ values.diag() @ q.T
    objective = objective_of(lambda w: 0.5 * w @ a @ w + b @ w, w.clone())
    found = landscape(objective, q.T[:2], axis=[-0.5, 0.0, 1.0, 3.0])
    s, t = torch.meshgrid(found.axis, found.axis, indexing="ij")
    start, slope = 0.5 * w @ a @ w + b @ w, (a @ w + b) @ q
    want = start + slope[0] * s + slope[1] * t + 0.5 * (7 * s**2 - 2 * t**2)
    torch.testing.assert_close(found.losses, want, rtol=1e-12, atol=1e-12)


def test_entries_are_the_losses_at_their_grid_points():
    objective = point_objective(relu_net())
    d1, d2 = random_directions(objective)
    center = torch.full_like(d1, 0.1)
    surface = landscape(objective, torch.stack([d1, d2]), radius=0.7, points=5, center=center)
    profile = landscape(objective, d2[None], radius=0.7, points=5)
    for i, a in enumerate(surface.axis.tolist()):
        assert profile.losses[i] == objective.loss(a * d2)
        for j, b in enumerate(surface.axis.tolist()):
            assert surface.losses[i][j] == objective.loss(center + (a * d1 + b * d2))
    assert surface.center_loss == objective.loss(center) == surface.losses[2, 2]
    assert surface.losses.unique().numel() == 25


def test_center_is_bitwise_the_loss_of_the_model():
    model = conv_net(dtype=torch.float32)
    objective = image_objective(model)
    with unchanged(model):
        for d in (random_directions(objective), random_directions(objective, 1)):
            for p in (3, 7):
                found = landscape(objective, d, points=p, radius=0.3)
                middle = (p // 2,) * len(d)
                assert found.axis[p // 2] == 0
                assert found.losses[middle] == found.center_loss == float(objective.loss())
                assert torch.equal(found.axis, -found.axis.flip(0))
                assert found.axis[-1] == 0.3
    even = landscape(objective, random_directions(objective, 1), points=4, radius=3.0)
    torch.testing.assert_close(even.axis, torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=DOUBLE))
    assert even.center_loss == float(objective.loss())


def test_each_point_costs_one_pass():
    calls = []
    objective = point_objective(relu_net(), progress=lambda stage, passes: calls.append((stage, passes)))
    landscape(objective, random_directions(objective), points=3)
    interpolation(objective, relu_net(1), points=4)
    assert calls == [("landscape", i) for i in range(1, 10)] + [("interpolation", i) for i in range(10, 14)]


def test_nonfinite_losses_are_kept_in_place():
    wall, top = torch.tensor(math.nan, dtype=DOUBLE), torch.tensor(math.inf, dtype=DOUBLE)

    def of(w):
        return wall if w[0] > 0.6 else top if w[1] > 0.6 else w[0] + 10 * w[1]

    objective = objective_of(of, torch.zeros(2, dtype=DOUBLE))
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
    """Multiply the first layer by 8 and the last by 1/8: with a ReLU between them, the same function."""
    with torch.no_grad():
        net[0].weight.mul_(8)
        net[0].bias.mul_(8)
        net[2].weight.div_(8)


def rescale_filters(net):
    """Multiply each filter before a BatchNorm, and its statistics, by its own factor: the same function."""
    factors = torch.tensor([8.0, 0.25, 2.0], dtype=DOUBLE)
    with torch.no_grad():
        net[0].weight.mul_(factors.view(3, 1, 1, 1))
        net[1].running_mean.mul_(factors)
        net[1].running_var.mul_(factors**2)


@pytest.mark.parametrize(
    ("make", "on", "rescale", "unmoved_by_layers"),
    [(relu_net, point_objective, rescale_layers, True), (conv_net, image_objective, rescale_filters, False)],
)
def test_rescaling_a_network_leaves_its_landscape_unchanged(make, on, rescale, unmoved_by_layers):
    def losses(net, normalize):
        for m in net:
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 1e-200  # eps is not rescaled, and would change the function
        objective = on(net)
        return landscape(objective, random_directions(objective, seed=5, normalize=normalize), points=3).losses

    before, after = make(), make()
    rescale(after)
    torch.testing.assert_close(losses(after, "filter"), losses(before, "filter"), rtol=1e-12, atol=0)
    layers = (losses(after, "layer") / losses(before, "layer") - 1).abs().max()
    plain = (losses(after, None) / losses(before, None) - 1).abs().max()
    assert plain > 0.1
    assert (layers < 1e-12) if unmoved_by_layers else (layers > 0.1)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("statistics", [False, True])
def test_models_are_unchanged_even_after_an_error(batch_norm, statistics):
    model, other = conv_net(0), conv_net(1)
    with unchanged(model, other):
        objective = image_objective(model, batch_norm=batch_norm)
        d = random_directions(objective)
        landscape(objective, d, points=3, statistics=statistics)
        interpolation(objective, other, points=3, extend=0.5, statistics=statistics)
        for measure in (lambda o: landscape(o, d, statistics=statistics), lambda o: interpolation(o, other)):
            broken = Objective(model, images(), loss=FailingLoss(8), batch_size=4, batch_norm=batch_norm)
            with pytest.raises(ArithmeticError, match="on purpose"):
                measure(broken)


def test_statistics_are_reestimated_at_each_point():
    model = conv_net()
    objective = image_objective(model)
    (d,) = random_directions(objective, 1)
    found = landscape(objective, d[None], points=3, statistics=True)
    for t, loss in zip(found.axis.tolist(), found.losses, strict=True):
        there = copy.deepcopy(model)
        nn.utils.vector_to_parameters(objective.weights + t * d, there.parameters())
        torch.testing.assert_close(loss, estimated(there), rtol=1e-12, atol=0)
    assert found.statistics
    assert found.center_loss == found.losses[1] != objective.loss()
    assert not landscape(point_objective(relu_net()), torch.ones(1, 51), points=3, statistics=True).statistics


def test_invalid_landscape_and_line_arguments_raise():
    objective = point_objective(relu_net())
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
        with pytest.raises(ValueError, match="(radius|points) must be|are needed"):
            landscape(objective, d, **wrong)
    for wrong in ({"points": 1}, {"extend": -0.1}, {"extend": math.inf}):
        with pytest.raises(ValueError, match="(points|extend) must be"):
            interpolation(objective, relu_net(1), **wrong)
    assert objective.passes == 0
