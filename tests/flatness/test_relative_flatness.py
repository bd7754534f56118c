"""Relative flatness against its double sum over blocks of the dense Hessian, and under rescalings."""

import pytest
import torch
from known_hessians import dense_hessian, objective, samples, tanh_net
from torch import nn

from steppe.flatness import Hessian, relative_flatness


def by_blocks(net, name):
    """Compute the sum over s, s' of <w_s, w_s'> Tr(H_s,s') from the dense Hessian."""
    dense, begin = dense_hessian(net, *samples()), 0
    for key, p in net.named_parameters():
        if key == name:
            break
        begin += p.numel()
    rows, columns = p.shape
    H = dense[begin : begin + p.numel(), begin : begin + p.numel()].view(rows, columns, rows, columns)
    return sum(
        float(p[s].detach() @ p[t].detach()) * float(H[s, :, t, :].trace()) for s in range(rows) for t in range(rows)
    )


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.weight"])
def test_exact_value_equals_the_sum_over_blocks_of_the_dense_hessian(name):
    net = tanh_net()
    problem = objective(net, batch_size=7)
    found = relative_flatness(Hessian(problem), name, exact=True)
    assert found.value == pytest.approx(by_blocks(net, name), rel=1e-9)
    assert found.error == 0
    alone = Hessian(objective(net, parameters=[name]))
    assert relative_flatness(alone, name, exact=True).value == pytest.approx(found.value, rel=1e-9)


@pytest.mark.slow
def test_estimate_is_unbiased_with_a_correct_standard_error():
    net = tanh_net()
    hessian, exact = Hessian(objective(net)), by_blocks(net, "2.weight")
    many = relative_flatness(hessian, "2.weight", probes=800)
    assert many.value == pytest.approx(exact, abs=3 * many.error)
    assert 0 < many.error < 0.1 * exact
    hits = 0
    for seed in range(25):
        found = relative_flatness(hessian, "2.weight", probes=20, seed=seed)
        hits += abs(found.value - exact) < 2.09 * found.error
    assert 20 <= hits <= 25, "of 25 intervals of 95 %"


def relu_pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def flatness(net):
    hessian = Hessian(objective(net))
    return [relative_flatness(hessian, name, exact=True).value for name in ("0.weight", "2.weight")]


def rescaled_neurons(net, factors):
    """Multiply each neuron of the first layer by its own factor, and divide its outgoing weights by it."""
    with torch.no_grad():
        net[0].weight.mul_(factors[:, None])
        net[0].bias.mul_(factors)
        net[2].weight.div_(factors)
    return net


def test_rescaling_layers_preserves_both_values_and_rescaling_neurons_that_of_their_layer():
    plain, layers = (
        flatness(relu_pair()),
        flatness(rescaled_neurons(relu_pair(), torch.full((6,), 8.0, dtype=torch.float64))),
    )
    assert layers == pytest.approx(plain, rel=1e-9)
    neurons = flatness(rescaled_neurons(relu_pair(), torch.tensor([0.1, 8.0, 3.0, 1.0, 0.5, 2.0], dtype=torch.float64)))
    assert neurons[0] == pytest.approx(plain[0], rel=1e-9)
    assert neurons[1] != pytest.approx(plain[1], rel=1e-2)


def test_seed_determines_the_result_and_probes_share_passes():
    problem = objective(tanh_net())
    hessian = Hessian(problem)
    first, again, other = (relative_flatness(hessian, "0.weight", probes=20, seed=seed) for seed in (0, 0, 1))
    assert problem.passes == 3 * 2
    assert first == again != other


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("0.wait", {}, "0.wait is not among the parameters of the objective: 0.weight, 0.bias"),
        ("0.bias", {}, r"0.bias has shape \(6,\).*matrix"),
        ("0.weight", {"probes": 0}, "probes must be 1 or more"),
    ],
)
def test_invalid_relative_flatness_arguments_raise(name, options, message):
    with pytest.raises(ValueError, match=message):
        relative_flatness(Hessian(objective(tanh_net())), name, **options)
