"""Interpolation: the loss on the line between two models is bitwise theirs at the ends, and its barrier is exact."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    DOUBLE,
    conv_net,
    estimated,
    evaluated,
    image_objective,
)
from torch import nn

from steppe.flatness import Line, Objective, interpolation


def lerped(a, b, t, buffers_at):
    there, x, y = copy.deepcopy(a), a.state_dict(), b.state_dict()
    parameters = dict(a.named_parameters())
    steps = {k: t if k in parameters else buffers_at for k in x}
    there.load_state_dict({k: x[k] + s * (y[k] - x[k]) if x[k].is_floating_point() else x[k] for k, s in steps.items()})
    return there


@pytest.mark.parametrize("statistics", [False, True])
def test_losses_on_the_line_are_those_of_interpolated_models(statistics):
    a, b = conv_net(0), conv_net(1)
    of = estimated if statistics else evaluated
    line = interpolation(image_objective(a), b, points=5, extend=0.25, statistics=statistics)
    assert line.axis.tolist() == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert line.statistics == statistics
    for t, loss in zip(line.axis.tolist(), line.losses, strict=True):
        torch.testing.assert_close(loss, of(lerped(a, b, t, min(max(t, 0.0), 1.0))), rtol=1e-10, atol=0)
    inside = line.losses[1:-1]
    above = [x - ((1 - t) * inside[0] + t * inside[-1]) for t, x in zip((0, 0.25, 0.5, 0.75, 1), inside, strict=True)]
    assert line.barrier == pytest.approx(max(map(float, above)), rel=1e-12)


@pytest.mark.parametrize("form", [lambda net: net, nn.Module.state_dict])
def test_losses_at_both_ends_are_bitwise_those_of_the_models(form):
    # in float32 w + (w' - w) often differs from w'; each model has its own number of batches and its own statistics
    a, b = conv_net(0, torch.float32), conv_net(1, torch.float32)
    b[1].num_batches_tracked += 5
    with torch.no_grad():
        a[7].weight.mul_(1000.0)
    objective = image_objective(a)
    line = interpolation(objective, form(b), points=3)
    assert line.losses[0] == objective.loss()
    assert line.losses[-1] == image_objective(b).loss()
    w, there = objective.weights, image_objective(b).weights
    assert not torch.equal(w + (there - w), there)


class Masked(nn.Linear):
    """A linear layer whose weights are masked by a boolean buffer."""

    def __init__(self, *kept: bool) -> None:
        super().__init__(4, 1, bias=False, dtype=DOUBLE)
        self.register_buffer("kept", torch.tensor(kept))

    def forward(self, x):
        return F.linear(x, self.weight * self.kept)


def test_integer_buffers_are_those_of_the_nearer_end():
    a, b = Masked(True, True, False, False), Masked(False, True, True, False)
    data, (way,) = (torch.eye(4, dtype=DOUBLE), torch.ones(4, 1, dtype=DOUBLE)), b.weight - a.weight
    line = interpolation(Objective(a, data, loss=F.mse_loss), b, points=4)
    for t, loss, kept in zip(line.axis.tolist(), line.losses, (a.kept, a.kept, b.kept, b.kept), strict=True):
        want = ((a.weight[0] + t * way) * kept - 1).square().mean().detach()
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)


def test_vector_without_running_statistics_raises():
    a, b = conv_net(0), conv_net(1)
    objective, vector = image_objective(a), image_objective(b).weights
    with pytest.raises(ValueError, match="other is a vector without the running statistics"):
        interpolation(objective, vector)
    by_model = interpolation(objective, b, points=3, statistics=True)
    assert torch.equal(interpolation(objective, vector, points=3, statistics=True).losses, by_model.losses)


def test_barrier_of_known_losses():
    def barrier(*losses):
        axis = torch.linspace(-0.5, 1.5, len(losses), dtype=DOUBLE)
        return Line(axis, torch.tensor(losses, dtype=DOUBLE), False).barrier

    assert barrier(9, 1, 2, 3, 9) == 0  # a straight line; losses beyond the ends are ignored
    assert barrier(9, 1, 5, 3, 9) == 3
    assert barrier(9, 3, -1, 1, 9) == 0
    assert barrier(0, 1, math.inf, 3, 0) == math.inf
    assert math.isnan(barrier(0, 1, math.nan, 3, 0))
