"""The contract of `steppe.testing` for each method that is a rule of SAM; no edit is needed for a new one."""

import inspect
import itertools

import pytest
import torch
from named_methods import RULE_METHODS, WRAPPERS, build, passes_per_step

from steppe import papers, testing
from steppe.methods.registry import CARDS, FUNCTIONS
from support import BASES, batch, by_closure, each_in_turn, in_turn, model_bits, net, rest_is_slow

OTHER_BASES = ["sgd", "adamw"]

each = pytest.mark.parametrize("name", RULE_METHODS)


LONG_CHECKS = [
    testing.resumes_to_the_bit,
    testing.steps_that_are_not_finite_are_skipped,
    testing.no_value_is_read_on_the_host,
]


def is_short_or_in_turn(name: str, check: testing.Check) -> bool:
    return check not in LONG_CHECKS or in_turn(RULE_METHODS, LONG_CHECKS)(name, check)


@pytest.mark.parametrize(
    ("name", "check"), rest_is_slow(itertools.product(RULE_METHODS, testing.CHECKS), is_short_or_in_turn)
)
def test_method_keeps_the_contract(name, check):
    check(build(name))


@pytest.mark.parametrize(
    ("name", "base"),
    each_in_turn(RULE_METHODS, ["sgd", "adamw"]),
)
def test_method_resumes_around_other_bases(name, base):
    if (name, base) == ("msam", "sgd"):
        pytest.skip("plain SGD keeps no momentum to perturb along; test_msam.py has the error")
    testing.resumes_to_the_bit(build(name, base))


@pytest.mark.parametrize("name", WRAPPERS)
def test_references_name_a_paper_that_the_optimizer_cites(name):
    cited = [paper.arxiv for paper in papers.papers_of(build(name)(torch.nn.Sequential(torch.nn.LayerNorm(2))))]
    references = inspect.getdoc(FUNCTIONS[name]).partition("References:")[2]
    assert any(number in " ".join(references.split()) for number in cited)


@pytest.mark.parametrize(("name", "passes"), [("lookbehind_sam", 3.0), ("sampa", 2.0), ("gam", 4.0), ("c_flat", 4.0)])
def test_method_with_its_own_step_makes_the_planned_passes(name, passes):
    assert passes_per_step(name) == pytest.approx(passes)


@pytest.mark.parametrize("name", WRAPPERS)
def test_maximize_mirrors_minimization(name):
    """With maximize=True on the negative loss, every method takes the same steps, to the bit."""
    down, up = net(dropout=0.0), net(dropout=0.0)
    for model, sign in ((down, 1), (up, -1)):
        optimizer = build(name)(model)
        for group in optimizer.param_groups:
            group["maximize"] = sign < 0
        for step in range(4):
            x, y = batch(step)
            by_closure(optimizer, lambda m=model, s=sign, x=x, y=y: s * torch.nn.functional.cross_entropy(m(x), y))
    assert model_bits(down) == model_bits(up)


@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if "seed" in inspect.signature(f).parameters])
@pytest.mark.parametrize("seed", [None, 1.5, "3"])
def test_seed_that_is_no_whole_number_is_an_error(name, seed):
    model = net()
    first = BASES["sgd"](model.parameters()) if name in WRAPPERS else model.parameters()
    with pytest.raises(ValueError, match="seed must be a whole number"):
        FUNCTIONS[name](first, seed=seed, **CARDS[name].short_arguments(total_steps=20, n_data=8))
