"""The curvature of each layer against the blocks of the dense Hessian."""

import pytest
import torch
from known_hessians import DOUBLE, dense_hessian, objective, samples, tanh_net
from torch import nn

from steppe.flatness import GaussNewton, Hessian, by_layer, relative_flatness

LAYERS = {"0": slice(0, 30), "2": slice(30, 65), "4": slice(65, 83)}


@pytest.mark.slow
def test_rows_are_those_of_the_blocks_of_the_hessian():
    net = tanh_net()
    dense = dense_hessian(net, *samples())
    table = by_layer(objective(net, batch_size=7), probes=200, tol=1e-8)
    assert [row.layer for row in table] == list(LAYERS)
    for row in table:
        block = dense[LAYERS[row.layer], LAYERS[row.layer]]
        assert (row.n, row.parameters) == (len(block), (f"{row.layer}.weight", f"{row.layer}.bias"))
        assert row.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-9)
        assert row.lambda_max.error < 1e-6
        assert abs(row.trace.value - float(block.trace())) < 4 * row.trace.error
        assert row.trace.error < 0.1 * abs(float(block.trace()))
        weight = f"{row.layer}.weight"
        exact = relative_flatness(Hessian(objective(net)), weight, exact=True).value
        assert abs(row.relative_flatness.value - exact) < 4 * row.relative_flatness.error
    assert table["2"] is table.layers[1]
    assert len(table) == 3


def test_groups_and_another_matrix():
    net = tanh_net()
    groups = {"all": [k for k, _ in net.named_parameters()], "biases": ["4.bias", "0.bias"]}
    table = by_layer(objective(net), groups=groups, matrix=GaussNewton, tol=1e-8)
    whole = GaussNewton(objective(net))
    dense = whole(torch.eye(whole.n, dtype=DOUBLE))
    assert table["all"].lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-9)
    rows = torch.tensor([*range(24, 30), *range(80, 83)])
    expected = torch.linalg.eigvalsh(dense[rows][:, rows])[-1]
    assert table["biases"].lambda_max.value == pytest.approx(float(expected), rel=1e-9)
    assert table["biases"].parameters == ("0.bias", "4.bias")  # in the order of the model
    assert [row.relative_flatness for row in table] == [None, None]  # three linear layers, and none


def test_table_is_printed_with_a_row_for_each_layer():
    lines = str(by_layer(objective(tanh_net()), probes=2, max_matvecs=2)).splitlines()
    assert lines[0].split() == ["layer", "weights", "lambda_max", "trace", "relative", "flatness"]
    assert [line.split()[:2] for line in lines[1:]] == [["0", "30"], ["2", "35"], ["4", "18"]]
    assert "(not converged)" in lines[1]
    assert len({len(line) for line in lines}) == 1


def test_parameters_of_the_model_itself_are_a_layer():
    linear = nn.Linear(4, 3).double()
    (row,) = by_layer(objective(linear))
    assert (row.layer, row.n) == ("Linear", 15)
    assert row.relative_flatness is not None


@pytest.mark.parametrize(
    ("groups", "message"),
    [({"a": []}, "a has no parameters"), ({"a": ["0.scale"]}, "0.scale of a is not among the weights")],
)
def test_groups_that_are_not_of_the_weights_raise(groups, message):
    with pytest.raises(ValueError, match=message):
        by_layer(objective(tanh_net()), groups=groups)


def test_parametrized_layer_is_one_row():
    net = tanh_net()
    nn.utils.parametrizations.weight_norm(net[0])
    nn.utils.parametrizations.orthogonal(net[4])
    table = by_layer(objective(net), probes=1, tol=0.1)
    assert [row.layer for row in table] == ["0", "2", "4"]
    assert table["0"].parameters == (
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    )
    assert [row.relative_flatness is None for row in table] == [True, False, True]
    (row,) = by_layer(objective(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double())), probes=1, tol=0.1)
    assert row.layer == "ParametrizedLinear"
