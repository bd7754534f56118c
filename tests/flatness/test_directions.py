"""Directions: each filter as long as the weights' own, the same draws everywhere, and no way to another network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from solutions import DOUBLE, conv_net, on_images, on_points, relu_net, untouched
from torch import nn

from steppe.flatness import Objective
from steppe.flatness.directions import between, random_directions


class Zoo(nn.Module):
    """A parameter of every form; its loss is never asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.grouped = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.words = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))


def zoo(dtype=DOUBLE):
    torch.manual_seed(0)
    return Zoo().to(dtype)


def unasked(model, **options):
    return Objective(model, [], loss=F.mse_loss, **options)


def by_name(objective, vector):
    return dict(zip(objective.names, objective.unflatten(vector), strict=True))


def filters(name, w):
    """What computes one output, or one token's vector: by hand, one at a time."""
    if name == "up.weight":
        return [w[:, o] for o in range(3)]
    if name == "grouped.weight":  # two groups of two inputs, with three outputs each
        return [w[2 * g : 2 * g + 2, o] for g in range(2) for o in range(3)]
    return list(w)


def test_each_filter_is_as_long_as_the_weights_own_and_points_where_it_was_drawn():
    objective = unasked(zoo())
    w = by_name(objective, objective.weights)
    for drawn, d in zip(random_directions(objective, 3, normalize=None), random_directions(objective, 3), strict=True):
        d, drawn = by_name(objective, d), by_name(objective, drawn)
        for name in objective.names:
            if w[name].dim() < 2:
                assert not d[name].any(), name
                continue
            for w_f, d_f, r_f in zip(*(filters(name, t[name]) for t in (w, d, drawn)), strict=True):
                torch.testing.assert_close(d_f, r_f * (w_f.norm() / r_f.norm()), rtol=1e-12, atol=0)


def test_layers_and_single_weights():
    objective = unasked(zoo())
    w = by_name(objective, objective.weights)
    drawn, layer, each = (
        by_name(objective, random_directions(objective, 1, normalize=n)[0]) for n in (None, "layer", "weights")
    )
    for name, r in drawn.items():
        want = r * (w[name].norm() / r.norm()) if r.dim() > 1 else torch.zeros_like(r)
        torch.testing.assert_close(layer[name], want, rtol=1e-12, atol=0)
        torch.testing.assert_close(each[name], r * w[name].abs(), rtol=1e-12, atol=0)


def test_draws_are_gaussian_and_independent():
    # "random" directions that are nearly all ones have been seen in use
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 200))
    a, b = random_directions(unasked(model), normalize=None).double()
    c = random_directions(unasked(model), 1, seed=1, normalize=None)[0].double()
    first, second = a[: 200 * 100], a[-200 - 200 * 100 : -200]  # two parameters of as many entries
    assert abs(a.mean()) < 5 / len(a) ** 0.5
    assert abs(a.var() - 1) < 5 * (2 / len(a)) ** 0.5
    assert abs((a**4).mean() - 3) < 5 * (96 / len(a)) ** 0.5
    for x, y in ((a, b), (a, c), (first, second)):
        assert abs(F.cosine_similarity(x, y, dim=0)) < 5 / len(x) ** 0.5


def test_two_models_of_the_same_shapes_get_the_same_draws():
    model = zoo()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(4.0)
    directions = random_directions(unasked(model), seed=3)
    assert torch.equal(random_directions(unasked(other), seed=3), 4 * directions)
    assert torch.equal(random_directions(unasked(model), 1, seed=3), directions[:1])
    single = random_directions(unasked(zoo(torch.float32)), seed=3)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), directions, rtol=1e-5, atol=1e-6)
    assert not torch.equal(random_directions(unasked(model), seed=4), directions)


def test_a_filter_of_zeros_stays_one_and_the_model_what_it_is():
    model = conv_net()
    with torch.no_grad():
        model[0].weight[1] = 0.0
    with untouched(model):
        objective = on_images(model)
        d = by_name(objective, random_directions(objective)[0])
    assert not d["0.weight"][1].any()
    assert d["0.weight"][[0, 2]].all()


def test_only_the_weights_that_were_chosen_move():
    objective = on_images(conv_net(), parameters=["7.weight"])
    assert random_directions(objective).shape == (2, 24)


def test_directions_that_cannot_be_drawn():
    objective = on_images(conv_net(), parameters=["7.bias"])
    with pytest.raises(ValueError, match="there are none among 7.bias: choose 'weights' or None"):
        random_directions(objective)
    assert random_directions(objective, normalize=None).all()
    with pytest.raises(ValueError, match="count=0"):
        random_directions(objective, 0)
    with pytest.raises(ValueError, match="normalize='filters': choose"):
        random_directions(objective, normalize="filters")


def test_the_way_to_another_solution():
    model, other = conv_net(0), conv_net(1)
    objective = on_images(model)
    want = on_images(other).weights - objective.weights
    for given in (other, other.state_dict(), on_images(other).weights):
        assert torch.equal(between(objective, given), want)
    assert torch.equal(between(objective, model), torch.zeros(objective.n, dtype=DOUBLE))


def test_a_tied_weight_is_one():
    def tied(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    objective = unasked(tied(0))
    for given in (tied(1), tied(1).state_dict()):
        assert between(objective, given).shape == (24,)


def test_there_is_no_way_to_another_network():
    objective = on_points(relu_net())
    state = relu_net(1).state_dict()
    with pytest.raises(ValueError, match=r"other: 2\.bias missing; 2\.offset too much\. Between two networks"):
        between(objective, {k.replace("2.bias", "2.offset"): v for k, v in state.items()})
    with pytest.raises(ValueError, match=r"0\.weight is of shape \(4, 6\), and here of \(6, 4\)"):
        between(objective, state | {"0.weight": state["0.weight"].T})
    with pytest.raises(ValueError, match=r"shape \(5,\) was given"):
        between(objective, torch.zeros(5, dtype=DOUBLE))
    with pytest.raises(TypeError, match="other is str: give a model"):
        between(objective, "checkpoint.pt")
    with pytest.raises(ValueError, match=r"other: 1\.running_mean missing"):
        between(on_images(conv_net()), {k: v for k, v in conv_net().state_dict().items() if k != "1.running_mean"})


def test_what_is_not_among_the_weights_must_be_the_same():
    model, other = conv_net(0), conv_net(1)
    with pytest.raises(ValueError, match=r"0\.weight differs, and is not among the weights"):
        between(on_images(model, parameters=["7.weight"]), other)
    last = copy.deepcopy(model)
    nn.init.ones_(last[7].weight)
    assert torch.equal(between(on_images(model, parameters=["7.weight"]), last), 1 - model[7].weight.flatten())
