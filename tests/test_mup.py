"""Radii by layer and width: the effect of each layer's perturbation does not change with the width."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from steppe.mup import parameter_groups

WIDTHS = (64, 256, 1024)


def network(n: int, *, device="cpu") -> nn.Sequential:
    layers = [nn.Linear(10, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 3)]
    return nn.Sequential(*layers).to(device, torch.float64)


def in_mup(n: int, seed: int) -> nn.Sequential:
    """Standard deviations 1 / sqrt(fan-in), of the output layer 1 / n."""
    torch.manual_seed(seed)
    model = network(n)
    for i, std in ((0, 10**-0.5), (2, n**-0.5), (4, 1 / n)):
        nn.init.normal_(model[i].weight, std=std)
        nn.init.normal_(model[i].bias, std=1.0 if i < 4 else 0.1)
    return model


def effects(n: int, *, by_width: bool, seed: int) -> dict[str, float]:
    """The root mean square of what the perturbation of each parameter alone changes in the outputs."""
    model = in_mup(n, seed)
    groups = parameter_groups(model, network(WIDTHS[0]), 0.01) if by_width else list(model.parameters())
    optimizer = steppe.SAM(torch.optim.SGD(groups, lr=0.0), 0.01, model=model)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 10, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (20,), generator=generator)
    perturbed = {}
    for sam_pass in optimizer.passes():
        with sam_pass:
            F.cross_entropy(model(x), y).backward()
            if sam_pass.is_perturbed:
                perturbed = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(x)
        return {
            name: (torch.func.functional_call(model, {name: p}, (x,)) - before).square().mean().sqrt().item()
            for name, p in perturbed.items()
        }


def exponents(*, by_width: bool) -> dict[str, float]:
    """a in effect ~ width^a, of each parameter."""
    means = []
    for n in WIDTHS:
        found = [effects(n, by_width=by_width, seed=seed) for seed in range(4)]
        means.append({name: sum(math.log(one[name]) for one in found) / len(found) for name in found[0]})
    span = math.log(WIDTHS[-1] / WIDTHS[0])
    return {name: (means[-1][name] - means[0][name]) / span for name in means[0]}


def test_effect_of_each_perturbation_does_not_depend_on_the_width():
    found = exponents(by_width=True)
    assert found == {name: pytest.approx(0.0, abs=0.2) for name in found}


def test_perturbation_of_sam_reaches_only_the_output_layer_of_a_wide_network():
    found = exponents(by_width=False)
    first, hidden, output = (pytest.approx(a, abs=0.2) for a in (-1.5, -0.5, 0.5))
    assert found == {
        **{"0.weight": first, "0.bias": first, "2.weight": hidden, "2.bias": first},
        **{"4.weight": output, "4.bias": hidden},
    }


def test_radii_and_learning_rates_follow_the_widths():
    model = network(64)
    names = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(model, network(16, device="meta"), rho=0.1, lr=0.01)
    found = {names[p]: (group["sam_rho"], group["lr"]) for group in groups for p in group["params"]}
    hidden, first, output = (0.2, 0.01), (0.8, 0.04), (0.05, 0.0025)
    assert found == {
        **{"0.weight": first, "0.bias": first, "2.weight": hidden, "2.bias": first},
        **{"4.weight": output, "4.bias": hidden},
    }


def test_same_width_leaves_rho_and_has_one_group():
    (group,) = parameter_groups(network(16), network(16), rho=0.3)
    assert group["sam_rho"] == 0.3
    assert "lr" not in group
    assert len(group["params"]) == 6


def test_each_kind_of_layer_has_the_radius_of_its_role():
    def net(n):
        attention = nn.MultiheadAttention(n, 2)
        modules = {"embed": nn.Embedding(50, n), "norm": nn.LayerNorm(n), "attention": attention}
        convolutions = {"conv": nn.Conv2d(n, 2 * n, 3), "up": nn.ConvTranspose2d(5, n, 3)}
        depthwise = {"depthwise": nn.Conv1d(n, n, 3, groups=n)}
        return nn.ModuleDict({**modules, **convolutions, **depthwise, "head": nn.Linear(n, 4, bias=False)})

    model = net(16)
    groups = parameter_groups(model, net(4), rho=1.0)
    factor = {p: group["sam_rho"] / 2.0 for group in groups for p in group["params"]}  # sqrt(n) = 2
    found = {name: factor[p] for name, p in model.named_parameters()}
    input_like = {"embed.weight", "norm.weight", "norm.bias", "up.weight", "up.bias", "conv.bias", "depthwise.weight"}
    hidden = {"attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"}
    assert {name for name, value in found.items() if value == 4.0} >= input_like
    assert {name for name, value in found.items() if value == 1.0} == hidden
    assert {name for name, value in found.items() if value == 0.25} == {"head.weight"}


def test_sam_uses_the_radius_of_each_group():
    model = in_mup(32, 0)
    groups = parameter_groups(model, network(8), 0.05)
    optimizer = steppe.SAM(torch.optim.SGD(groups, lr=0.1), model=model)
    assert sorted({group["sam_rho"] for group in optimizer.param_groups}) == pytest.approx([0.025, 0.1, 0.4])


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 16), "head": nn.Linear(16, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize(
    ("model", "base", "message"),
    [
        (network(8), network(8)[:3], "have other parameters, such as 4.bias"),
        (nn.Linear(8, 8), nn.Conv1d(2, 2, 1), r"shape \(8, 8\) in model=, and \(2, 2, 1\) in base_model="),
        (nn.Linear(8, 8), nn.Linear(2, 2), "the factor of the width is unknown"),
    ],
)
def test_models_that_do_not_fit_are_an_error(model, base, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, base)


def test_tied_weights_are_an_error():
    base = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    with pytest.raises(ValueError, match="different roles"):
        parameter_groups(tied(), base)
