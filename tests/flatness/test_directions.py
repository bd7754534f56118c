"""Random directions with the norms of the filters, and directions from one model to another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import DOUBLE, conv_net, image_objective, point_objective, relu_net, unchanged
from torch import nn

from steppe.flatness import Objective, between, random_directions


class Zoo(nn.Module):
    """A parameter of every kind of layer, without a forward pass."""

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


def without_data(model, **options):
    return Objective(model, [], loss=F.mse_loss, **options)


def by_name(objective, vector):
    return dict(zip(objective.names, objective.unflatten(vector), strict=True))


def filters(name, w):
    """List the filters: the weights of one output, or the vector of one token."""
    if name == "up.weight":
        return [w[:, o] for o in range(3)]
    if name == "grouped.weight":  # two groups of two inputs, with three outputs each
        return [w[2 * g : 2 * g + 2, o] for g in range(2) for o in range(3)]
    return list(w)


def test_filters_have_the_norms_of_the_weights_and_the_drawn_directions():
    objective = without_data(zoo())
    w = by_name(objective, objective.weights)
    for drawn, d in zip(random_directions(objective, 3, normalize=None), random_directions(objective, 3), strict=True):
        d, drawn = by_name(objective, d), by_name(objective, drawn)
        for name in objective.names:
            if w[name].dim() < 2:
                assert not d[name].any(), name
                continue
            for w_f, d_f, r_f in zip(*(filters(name, t[name]) for t in (w, d, drawn)), strict=True):
                torch.testing.assert_close(d_f, r_f * (w_f.norm() / r_f.norm()), rtol=1e-12, atol=0)


def test_normalization_by_layers_and_by_single_weights():
    objective = without_data(zoo())
    w = by_name(objective, objective.weights)
    drawn, layer, each = (
        by_name(objective, random_directions(objective, 1, normalize=n)[0]) for n in (None, "layer", "weights")
    )
    for name, r in drawn.items():
        want = r * (w[name].norm() / r.norm()) if r.dim() > 1 else torch.zeros_like(r)
        torch.testing.assert_close(layer[name], want, rtol=1e-12, atol=0)
        torch.testing.assert_close(each[name], r * w[name].abs(), rtol=1e-12, atol=0)


def test_draws_are_gaussian_and_independent():
    # published code has used "random" directions of which nearly all entries are ones
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 200))
    a, b = random_directions(without_data(model), normalize=None).double()
    c = random_directions(without_data(model), 1, seed=1, normalize=None)[0].double()
    first, second = a[: 200 * 100], a[-200 - 200 * 100 : -200]  # two parameters of equal size
    assert abs(a.mean()) < 5 / len(a) ** 0.5
    assert abs(a.var() - 1) < 5 * (2 / len(a)) ** 0.5
    assert abs((a**4).mean() - 3) < 5 * (96 / len(a)) ** 0.5
    for x, y in ((a, b), (a, c), (first, second)):
        assert abs(F.cosine_similarity(x, y, dim=0)) < 5 / len(x) ** 0.5


def test_models_of_the_same_shapes_get_the_same_draws():
    model = zoo()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(4.0)
    directions = random_directions(without_data(model), seed=3)
    assert torch.equal(random_directions(without_data(other), seed=3), 4 * directions)
    assert torch.equal(random_directions(without_data(model), 1, seed=3), directions[:1])
    single = random_directions(without_data(zoo(torch.float32)), seed=3)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), directions, rtol=1e-5, atol=1e-6)
    assert not torch.equal(random_directions(without_data(model), seed=4), directions)


def test_zero_filters_get_zero_directions_and_the_model_is_unchanged():
    model = conv_net()
    with torch.no_grad():
        model[0].weight[1] = 0.0
    with unchanged(model):
        objective = image_objective(model)
        d = by_name(objective, random_directions(objective)[0])
    assert not d["0.weight"][1].any()
    assert d["0.weight"][[0, 2]].all()


def test_directions_cover_only_the_selected_parameters():
    objective = image_objective(conv_net(), parameters=["7.weight"])
    assert random_directions(objective).shape == (2, 24)


def test_invalid_direction_arguments_raise():
    objective = image_objective(conv_net(), parameters=["7.bias"])
    with pytest.raises(ValueError, match="there are none among 7.bias: choose 'weights' or None"):
        random_directions(objective)
    assert random_directions(objective, normalize=None).all()
    with pytest.raises(ValueError, match="count must be 1 or more"):
        random_directions(objective, 0)
    with pytest.raises(ValueError, match="normalize='filters': choose"):
        random_directions(objective, normalize="filters")


def test_direction_to_a_model_its_state_dict_and_its_vector():
    model, other = conv_net(0), conv_net(1)
    objective = image_objective(model)
    want = image_objective(other).weights - objective.weights
    for form in (other, other.state_dict(), image_objective(other).weights):
        assert torch.equal(between(objective, form), want)
    assert torch.equal(between(objective, model), torch.zeros(objective.n, dtype=DOUBLE))


def test_tied_weights_are_counted_once():
    def tied(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    objective = without_data(tied(0))
    for form in (tied(1), tied(1).state_dict()):
        assert between(objective, form).shape == (24,)


def test_direction_to_another_architecture_raises():
    objective = point_objective(relu_net())
    state = relu_net(1).state_dict()
    with pytest.raises(
        ValueError, match=r"other: 2\.bias missing; 2\.offset unexpected\. Weights can be interpolated only"
    ):
        between(objective, {k.replace("2.bias", "2.offset"): v for k, v in state.items()})
    with pytest.raises(ValueError, match=r"0\.weight has shape \(4, 6\), but \(6, 4\) in this model"):
        between(objective, state | {"0.weight": state["0.weight"].T})
    with pytest.raises(ValueError, match=r"shape \(5,\) was given"):
        between(objective, torch.zeros(5, dtype=DOUBLE))
    with pytest.raises(TypeError, match="other is str: pass a model"):
        between(objective, "checkpoint.pt")
    with pytest.raises(ValueError, match=r"other: 1\.running_mean missing"):
        between(
            image_objective(conv_net()), {k: v for k, v in conv_net().state_dict().items() if k != "1.running_mean"}
        )


def test_unselected_parameters_must_be_equal():
    model, other = conv_net(0), conv_net(1)
    with pytest.raises(ValueError, match=r"0\.weight differs, but is not among the weights"):
        between(image_objective(model, parameters=["7.weight"]), other)
    last = copy.deepcopy(model)
    nn.init.ones_(last[7].weight)
    assert torch.equal(between(image_objective(model, parameters=["7.weight"]), last), 1 - model[7].weight.flatten())
