"""The named methods: what a step costs, and that the contract holds for each."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from steppe import papers, testing, variants
from support import BASES, by_closure

# What each is called with beyond the base and the model, and the passes that a step then has on average.
VARIANTS = {
    "sam": ({}, 2.0),
    "asam": ({}, 2.0),
    "msam": ({}, 1.0),
    "rwp": ({}, 1.0),
    "mixed_rwp": ({}, 2.0),
    "fisher_sam": ({}, 2.0),
    "layerwise_sam": ({}, 2.0),
    "sparse_sam": ({"every": 2}, 2.0),
    "dynamic_sparse_sam": ({"steps": 20, "every": 2}, 2.0),
    "esam": ({}, 2.0),
    "friendly_sam": ({}, 2.0),
    "vasso": ({}, 2.0),
    "zsharp": ({}, 2.0),
    "sam_on": ({"rho": 0.1}, 2.0),
    "gsam": ({}, 2.0),
    "wsam": ({}, 2.0),
    "pgn": ({}, 2.0),
    "looksam": ({"k": 5}, 1.2),
    "late_sam": ({"start": 0.75, "steps": 20}, 1.25),
    "random_sam": ({"p": 1.0}, 2.0),
    "aesam": ({"steps": 20}, None),
}
# With step rules of their own: tests/methods has what they owe.
OWN = {"lookbehind_sam": ({"k": 2}, 3.0), "sampa": ({}, 2.0)}
IN_THE_LOSS = {"saf", "mesa"}
each = pytest.mark.parametrize("name", VARIANTS)


def maker(name, base="momentum"):
    given, _ = (VARIANTS | OWN)[name]
    return lambda model: getattr(variants, name)(BASES[base](model.parameters()), **{"rho": 0.1, **given}, model=model)


def test_every_variant_is_tested():
    public = {n for n, f in vars(variants).items() if inspect.isfunction(f) and f.__module__ == variants.__name__}
    assert {n for n in public if not n.startswith("_")} == {*VARIANTS, *OWN, *IN_THE_LOSS, "bsam"}


@pytest.mark.parametrize("name", [n for n, (_, cost) in (VARIANTS | OWN).items() if cost])
def test_the_cost_is_counted(name):
    assert testing.passes_per_step(maker(name), 20) == pytest.approx((VARIANTS | OWN)[name][1])


def test_what_depends_on_the_gradients_costs_between_one_and_two_passes():
    assert 1.0 < testing.passes_per_step(maker("aesam"), 20) < 2.0


def test_a_climb_on_a_quarter_of_the_batch_and_selected_samples_cost_what_they_say():
    """Samples that go through, forward and backward; without a backward they count a third."""
    w, x = nn.Parameter(torch.randn(3)), torch.randn(64, 3)
    seen = []

    def losses(x):
        seen.append(len(x) * (1.0 if torch.is_grad_enabled() else 1 / 3))
        return (x @ w).square()

    quarter = variants.sam(torch.optim.SGD([w], lr=0.01))
    quarter.step(steppe.closures.fraction(quarter, lambda x: losses(x).mean(), (x,), fraction=0.25))
    assert sum(seen) / 64 == 1.25
    seen.clear()
    esam = variants.esam(torch.optim.SGD([w], lr=0.01))
    esam.step(steppe.closures.selected(esam, losses, (x,), gamma=0.5))
    assert sum(seen) / 64 == pytest.approx(4 / 3 + 0.5)


@each
@pytest.mark.parametrize("check", testing.CHECKS)
def test_it_keeps_the_contract(name, check):
    check(maker(name))


@each
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_it_trains_around_other_bases(name, base):
    if (name, base) == ("msam", "sgd"):
        pytest.skip("plain SGD keeps no momentum to climb along; tests/test_one_pass.py has the refusal")
    testing.resumes_to_the_bit(maker(name, base))


@pytest.mark.parametrize("name", VARIANTS | OWN)
def test_its_docstring_names_the_paper_that_it_cites(name):
    optimizer = maker(name)(testing.Net())
    cited = [paper.arxiv for paper in papers.papers_of(optimizer)]
    source = inspect.getdoc(getattr(variants, name)).partition("Source:")[2]
    assert any(number in " ".join(source.split()) for number in cited)
    assert "step" in inspect.getdoc(getattr(variants, name))


def test_several_climbs_and_some_of_the_parameters_are_arguments():
    model = testing.Net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    assert variants.sam(base, steps=3).perturbation == steppe.AscentSteps(steppe.L2(), 3)
    only = variants.asam(base, only=steppe.norm_layers(model)).perturbation
    assert (only.rule, len(only.parameters)) == (steppe.Adaptive(), 6)
    assert testing.passes_per_step(lambda m: variants.sam(torch.optim.SGD(m.parameters(), lr=0.1), steps=3), 4) == 4.0


def test_those_in_the_loss_are_made_with_their_arguments():
    model = testing.Net()
    assert variants.saf(100, 3, lmbda=0.2).lmbda == 0.2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mesa = variants.mesa(model, optimizer, start=0, beta=0.5)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))

    def loss():
        logits = model(x)
        return F.cross_entropy(logits, y) + mesa(logits, x, epoch=0)

    by_closure(optimizer, loss)


def test_bsam_is_an_optimizer_of_its_own():
    model = testing.Net()
    optimizer = variants.bsam(model.parameters(), 0.05, n_data=100, model=model, seed=3)
    assert type(optimizer) is steppe.methods.bsam.BSAM
    by_closure(optimizer, lambda: model(torch.randn(8, 6)).square().mean())
