"""The loss after rounding and after training on another task, against known answers and plain loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from known_hessians import DOUBLE, matrix_with_spectrum, objective, quadratic, samples, tanh_net
from small_networks import conv_net, image_objective, images, unchanged
from torch import nn

from steppe.flatness import Objective, after_rounding, after_training, round_weights


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_loss_after_rounding_is_that_of_the_rounded_model(bits, per_channel):
    net, (x, y) = tanh_net(), samples()
    found = after_rounding(objective(net, batch_size=7), bits, per_channel=per_channel)
    with torch.no_grad():
        assert found.before == pytest.approx(float(F.cross_entropy(net(x), y)), rel=1e-12)
        with round_weights(net, bits, per_channel=per_channel):
            assert found.after == pytest.approx(float(F.cross_entropy(net(x), y)), rel=1e-12)
    assert found.increase == found.after - found.before != 0


def test_only_weights_of_the_objective_are_rounded():
    net, (x, y) = tanh_net(), samples()
    last = copy.deepcopy(net)
    found = after_rounding(objective(net, parameters=["4.weight", "4.bias"]), 2)
    with round_weights(last[4], 2), torch.no_grad():
        assert found.after == pytest.approx(float(F.cross_entropy(last(x), y)), rel=1e-12)
    assert after_rounding(objective(net, parameters=["0.bias"]), 2).increase == 0


def test_fewer_than_two_bits_raise_before_anything_is_measured():
    with pytest.raises(ValueError, match="bits must be 2 or more"):
        after_rounding(objective(tanh_net()), 1)


def test_gradient_descent_on_another_quadratic_has_a_closed_form():
    a, other = (matrix_with_spectrum([0.5, 1.0, 4.0], seed) for seed in (0, 1))
    w = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    found = after_training(
        quadratic(a, w=w), quadratic(other, w=w), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), steps=5
    )
    moved = torch.linalg.matrix_power(torch.eye(3, dtype=DOUBLE) - 0.1 * other, 5) @ w
    for value, matrix, at in (
        (found.before, a, w),
        (found.after, a, moved),
        (found.other_before, other, w),
        (found.other_after, other, moved),
    ):
        assert value == pytest.approx(float(at @ matrix @ at / 2), rel=1e-12)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_training_equals_a_plain_loop_over_batches_in_evaluation_mode(kind):
    def optimizer(parameters):
        if kind == "adam":
            return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    net = conv_net()
    x, y = images()
    y = (y + 1) % 3
    plain = copy.deepcopy(net).eval()
    loop = optimizer(plain.parameters())
    parts = list(zip(x.split(4), y.split(4), strict=True))
    for step in range(7):  # two epochs of three batches, and one
        loop.zero_grad()
        a, b = parts[step % 3]
        F.cross_entropy(plain(a), b).backward()
        loop.step()
    first, other = image_objective(net), Objective(net, (x, y), loss=F.cross_entropy)
    with unchanged(net):
        found = after_training(first, other, optimizer=optimizer, steps=7, batch_size=4)
    expected = [float(F.cross_entropy(plain(x), targets).detach()) for targets in (images()[1], y)]
    assert [found.after, found.other_after] == pytest.approx(expected, rel=1e-9)
    assert found.other_after < found.other_before


def test_no_steps_change_nothing():
    found = after_training(objective(tanh_net()), objective(tanh_net()), optimizer=torch.optim.SGD, steps=0)
    assert found.increase == 0
    assert found.before == found.other_before == found.other_after


def test_arguments_that_cannot_be_used_raise():
    o = objective(tanh_net())
    with pytest.raises(ValueError, match="steps must be 0 or more"):
        after_training(o, o, optimizer=torch.optim.SGD, steps=-1)
    with pytest.raises(ValueError, match="other parameters than those of the objective"):
        after_training(o, objective(tanh_net(), parameters=["0.bias"]), optimizer=torch.optim.SGD, steps=1)
    empty = Objective(nn.Linear(2, 1), [], loss=F.mse_loss)
    with pytest.raises(ValueError, match="no samples"):
        after_training(empty, empty, optimizer=torch.optim.SGD, steps=1)
