"""What is cited is what is used."""

import re

import pytest
import torch

import steppe
from steppe import papers
from steppe.papers import Paper, citation

ALL = {name: paper for name, paper in vars(papers).items() if isinstance(paper, Paper)}


def base():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def keys(*used):
    return re.findall(r"^@\w+\{(\w+),$", citation(*used), flags=re.MULTILINE)


def test_each_slot_is_cited_once_and_sam_first():
    optimizer = steppe.SAM(
        base(),
        perturbation=steppe.AscentSteps(steppe.ParameterSubset(steppe.Adaptive(), [torch.zeros(1)]), 2),
        combination=steppe.GradientReuse(),
        cadence=steppe.Bernoulli(0.5),
    )
    assert keys(optimizer) == ["foret2021sam", "kwon2021asam", "liu2022looksam", "zhao2022rst"]
    assert keys(steppe.SAM(base())) == ["foret2021sam"]
    assert keys(base()) == []


def test_closures_and_rules_of_ones_own_are_cited():
    mine = Paper("me2026", ("Ada Lovelace",), "On Climbing", "2611.00001", 2026)

    class Mine(steppe.L2):
        paper = mine

    optimizer = steppe.SAM(base(), perturbation=Mine())
    assert keys(optimizer, steppe.closures.fraction) == ["foret2021sam", "me2026", "bahri2022lmsam"]
    assert "@misc{me2026," in citation(optimizer)


@pytest.mark.parametrize("name", ALL)
def test_an_entry_is_whole(name):
    paper = ALL[name]
    entry = paper.bibtex()
    assert entry.count("{") == entry.count("}")
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert paper.year >= 2000 + int(paper.arxiv[:2])
    assert paper.key.startswith(re.sub(r"\W", "", paper.authors[0].split()[-1].lower().replace("ö", "oe")))
    assert entry.isprintable() or "\n" in entry


def test_no_paper_stands_twice():
    assert len({p.key for p in ALL.values()}) == len({p.arxiv for p in ALL.values()}) == len(ALL)
