"""Constant masks, and masks around other rules."""

import copy

import pytest
import torch
from torch import nn

import steppe
from steppe import SAM
from steppe.rules.l2 import L2
from steppe.rules.linf import LInf
from steppe.rules.masks import Masked
from steppe.rules.subsets import ParameterSubset
from support import by_closure


def test_mask_restricts_its_parameter_and_no_other():
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([12.0]))
    masks = {a: torch.tensor([False, True])}
    optimizer = SAM(torch.optim.SGD([a, b], lr=0.0), rho=1.0, perturbation=Masked(L2(), masks))
    masks.clear()
    points = []
    by_closure(
        optimizer, lambda: (points.append(a.tolist() + b.tolist()), (a.square().sum() + b.square().sum()) / 2)[1]
    )
    assert points[1] == pytest.approx([3.0, 4.0 + 4 / 13, 12.0 + 12 / 13])
    a2, copied = copy.deepcopy((a, optimizer))
    assert any(p is a2 for p in copied.perturbation.masks)
    z = nn.Parameter(torch.tensor([1 + 1j, 2 + 2j]))
    optimizer = SAM(
        torch.optim.SGD([z], lr=0.0), rho=1.0, perturbation=Masked(LInf(), {z: torch.tensor([True, False])})
    )
    points = []
    by_closure(optimizer, lambda: (points.append(z.tolist()), z.abs().square().sum())[1])
    assert points[1] == [2 + 2j, 2 + 2j]


def test_several_ascent_steps_can_be_masked_or_restricted():
    p, q = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(1))
    for rule in (
        ParameterSubset(steppe.AscentSteps(LInf(), ascent_steps=2), [p]),
        Masked(steppe.AscentSteps(LInf(), ascent_steps=2), {q: torch.zeros(1, dtype=torch.bool)}),
    ):
        optimizer = SAM(torch.optim.SGD([p, q], lr=0.0), rho=1.0, perturbation=rule)
        points = []
        by_closure(
            optimizer, lambda points=points: (points.append(p.tolist() + q.tolist()), p.square().sum() + q.sum())[1]
        )
        assert points == [[3, 4, 1], [3.5, 4.5, 1], [4, 5, 1]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2), r"a bool tensor of its shape \(2,\), got torch.float32"),
        (torch.ones(3, dtype=torch.bool), r"shape \(3,\)"),
    ],
)
def test_mask_of_another_dtype_or_shape_is_an_error(mask, message):
    with pytest.raises(ValueError, match=message):
        Masked(L2(), {torch.ones(2): mask})
