"""Citations: the papers of all rules in use, each once, as valid BibTeX."""

import re

import pytest
import torch

import steppe
from steppe.methods.registry import CARDS
from steppe.papers import Paper, citation

ALL = {paper.key: paper for card in CARDS.values() for paper in card.papers}


def base():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def keys(*used):
    return re.findall(r"^@\w+\{(\w+),$", citation(*used), flags=re.MULTILINE)


def test_each_rule_is_cited_once_and_sam_first():
    sgd = base()
    subset = steppe.ParameterSubset(steppe.Adaptive(), sgd.param_groups[0]["params"])
    optimizer = steppe.SAM(
        sgd,
        perturbation=steppe.AscentSteps(subset, 2),
        combination=steppe.GradientReuse(),
        cadence=steppe.Bernoulli(0.5),
    )
    assert keys(optimizer) == ["foret2021sam", "kwon2021asam", "liu2022looksam", "zhao2022rst"]
    assert keys(steppe.SAM(base())) == ["foret2021sam"]
    assert keys(base()) == []


def test_closures_and_rules_of_a_user_are_cited():
    own_paper = Paper("me2026", ("Ada Lovelace",), "On Perturbing", "2611.00001", 2026)

    class OwnRule(steppe.L2):
        paper = own_paper

    optimizer = steppe.SAM(base(), perturbation=OwnRule())
    assert keys(optimizer, steppe.closures.fraction) == ["foret2021sam", "me2026", "bahri2022lmsam"]
    assert "@misc{me2026," in citation(optimizer)


@pytest.mark.parametrize("method", ["gsam", steppe.variants.gsam])
def test_method_without_its_optimizer_raises(method):
    with pytest.raises(TypeError, match=r"the method 'gsam': give the optimizer that steppe.variants.gsam"):
        citation(method)


@pytest.mark.parametrize("key", ALL)
def test_bibtex_entry_is_valid_and_agrees_with_the_arxiv_number(key):
    paper = ALL[key]
    entry = paper.bibtex()
    assert entry.count("{") == entry.count("}")
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert paper.year >= 2000 + int(paper.arxiv[:2]) - 1  # some come to arXiv in the year after the conference
    assert paper.key.startswith(re.sub(r"\W", "", paper.authors[0].split()[-1].lower().replace("ö", "oe")))
    assert entry.isprintable() or "\n" in entry


def test_no_paper_is_defined_twice():
    papers = {paper for card in CARDS.values() for paper in card.papers}
    assert len({p.key for p in papers}) == len({p.arxiv for p in papers}) == len(papers)


@pytest.mark.parametrize("name", ["sagm", "mixed_rwp", "mixed_arwp"])
def test_methods_that_mix_gradients_do_not_cite_the_gradient_norm_penalty(name):
    optimizer = getattr(steppe.variants, name)(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
    assert "zhao2022pgn" not in steppe.citation(optimizer)
    assert "zhao2022pgn" in steppe.citation(steppe.PenalizedNorm())
