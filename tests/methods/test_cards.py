"""The method cards: complete, and in agreement with the code. Each test runs for all cards of the registry."""

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memory
import steppe
from steppe import closures, papers
from steppe.experiments.config.methods import METHODS
from steppe.methods._card import VERIFIED, MethodCard, Verified
from steppe.methods.cards import card, index
from steppe.methods.registry import CARDS, FUNCTIONS
from steppe.papers import Paper

ROOT = Path(__file__).parents[2]

each = pytest.mark.parametrize("name", CARDS)

# Arguments that are no hyperparameters: what is trained, and where and how it runs.
NOT_TUNED = {
    *("base_optimizer", "params", "model", "optimizer", "group", "dtype", "seed", "replay_rng"),
    *("per_rank", "scaler", "stochastic_rounding"),
    *("loss", "losses", "perturbation_loss", "loss_at_w", "logits", "targets", "batch", "rule", "samples", "classes"),
}


class CountingNet(nn.Module):
    """Counts the samples that pass through: one with a backward to come counts 1, without one 1/3."""

    counted: list[float] = []  # noqa: RUF012 (shared with MESA's copy, whose forward counts as well)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        self.counted.append(len(x) * (1.0 if torch.is_grad_enabled() else 1 / 3))
        return self.layers(x)


def prepared(method: MethodCard, network: nn.Module) -> nn.Module:
    """Return the network, with adapters for a method that needs them."""
    if not method.needs_adapters:
        return network
    pytest.importorskip("peft")
    return memory.with_adapters(network)


def base_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


@each
def test_what_a_method_was_verified_against_is_a_word_of_the_table_and_a_sentence_of_its_page(name):
    method = CARDS[name]
    (row,) = (line for line in index().splitlines() if line.startswith("|") and f"]({name}.md) |" in line)
    assert f"| {method.verified} |" in row
    assert f"## Checked against\n\n{VERIFIED[method.verified]}" in card(name)
    assert method.checked or method.verified == "nothing else"


def test_each_word_for_what_was_verified_has_its_sentence():
    assert set(VERIFIED) == set(get_args(Verified))


@each
def test_planned_passes_are_those_counted(name):
    method = CARDS[name]
    torch.manual_seed(0)
    network, steps = CountingNet(), 20
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    adapted = prepared(method, network)
    base = base_of(adapted)
    arguments = method.short_arguments(total_steps=steps, samples=8, classes=3)

    def losses(logits, y):
        return F.cross_entropy(logits, y, reduction="none")

    step = memory.stepper(method, base, adapted, losses, (x, y), **arguments)
    network.counted.clear()
    for _ in range(steps):
        step()
    counted = sum(network.counted) / (len(x) * steps)
    if method.passes is None:
        assert 1.0 < counted < 2.0
        return
    closure_arguments = {"fraction": 0.5} if method.function is closures.fraction else {}
    assert counted == pytest.approx(method.passes_with(**arguments, **closure_arguments))


@each
def test_planned_passes_are_those_of_the_comparison(name):
    card = CARDS[name]
    for spec, method in METHODS.items():
        if card.covers(spec) and card.passes is not None:
            # a gradient and 5 products with H, every 100 steps; one more backward and a product, every 10 steps
            updates = {"eigen_sam": 11 / 100, "sassha": 3 / 10}.get(name, 0)
            assert card.passes_with() + updates == pytest.approx(float(method.cost({})), abs=1e-4)


def test_each_method_of_the_comparison_belongs_to_one_card_and_has_its_label():
    for spec, method in METHODS.items():
        covering = [card for card in CARDS.values() if card.covers(spec)]
        is_plain = method.plain or spec == "base"  # the optimizer that a recipe or a task names
        assert len(covering) == (0 if is_plain else 1)
        assert all(card.label == method.label for card in covering)
    assert CARDS["ascent_steps"].covers("asam:rho=0.5,ascent_steps=3")


@each
def test_usage_code_runs_and_uses_the_cited_papers(name):
    method = CARDS[name]
    model = prepared(method, nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)))
    base = base_of(model)
    x, y = torch.randn(32, 6), torch.randint(10, (32,))
    scope = {
        **{"steppe": steppe, "F": F, "torch": torch, "base": base, "model": model, "x": x, "y": y, "epoch": 0},
        **{"logits": model(x), "indices": torch.arange(32)},
        "losses": lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
        "loss": lambda x, y: F.cross_entropy(model(x), y),
    }
    given = set(scope)
    exec(method.usage, scope)
    new = [value for key, value in scope.items() if key not in given and not key.startswith("__")]
    parts = [scope.get("optimizer", base), *(value for value in new if isinstance(value, nn.Module))]
    parts += [getattr(closures, n) for n in re.findall(r"steppe\.closures\.(\w+)", method.usage)]
    assert {p for part in parts for p in papers.papers_of(part)} >= set(method.papers) - {papers.SAM}
    assert method.paper in method.papers
    assert method.paper.url in card(name)
    assert method.paper.key in method.bibtex()


@each
def test_paper_of_the_card_is_in_the_references_of_the_function(name):
    references = inspect.getdoc(CARDS[name].function).partition("References:")[2]
    assert CARDS[name].paper.arxiv in " ".join(references.split())


def test_each_paper_in_the_methods_is_cited_by_a_card():
    modules = {inspect.getmodule(function) for card in CARDS.values() for function in (card.function,)}
    defined = {paper for module in modules for paper in vars(module).values() if isinstance(paper, Paper)}
    assert defined <= {paper for card in CARDS.values() for paper in card.papers}


@each
def test_each_hyperparameter_is_in_the_table(name):
    method = CARDS[name]
    functions = method.arguments_of or (method.function,)
    parameters = {p.name: p for function in functions for p in inspect.signature(function).parameters.values()}
    arguments = {n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert set(method.usual) >= arguments - NOT_TUNED
    assert set(method.usual) <= arguments
    assert set(method.required) <= arguments


@each
def test_card_is_complete_and_fits_one_screen(name):
    method, text = CARDS[name], card(name)
    headings = ["Hyperparameters", "Cost and memory", "Measured", "Checked against", "Caveats", "Citation"]
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == headings
    assert all(part in text for part in (method.equation, method.usage))
    assert all(part in text for part in ("**When to use it.**", "**When not to use it.**"))
    assert method.summary.count(". ") == 1
    assert "``" not in method.summary
    assert not method.summary.startswith(f"{method.label}:")
    assert method.caveats
    before, _, after = text.partition("## Measured\n")
    assert len((before + after[after.index("## ") :]).splitlines()) <= 60
    assert all(len(line) <= 120 or "|" in line or "http" in line for line in text.splitlines())
    assert all("|" not in usual for usual in [*method.usual.values(), method.when])  # they stand in tables


@pytest.mark.parametrize("name", [*FUNCTIONS, *(name for name in CARDS if CARDS[name].needs_adapters)])
def test_docstring_of_the_named_function_has_all_sections(name):
    doc = inspect.getdoc(CARDS[name].function)
    assert "step" in doc
    assert [head for head in ("\nArgs:", "\nReferences:") if head not in doc] == []
