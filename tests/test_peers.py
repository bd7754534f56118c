"""Trajectories of public implementations, for which an environment variable holds the path of a copy.

STEPPE_CLASSIC_SAM: sam.py of github.com/davda54/sam. STEPPE_OFFICIAL_ASAM: asam.py of github.com/SamsungLabs/ASAM.
STEPPE_OFFICIAL_MSAM: optimizer/msam.py of github.com/MarlonBecker/MSAM.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe.compat
from peer_copies import load
from support import batch, by_passes


def make_twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layers = nn.Linear(64, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)
    model = nn.Sequential(nn.Flatten(), *layers).double()
    return model, copy.deepcopy(model)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)  # the peers add 1e-12 or 1e-16 to the norm


@pytest.mark.parametrize("adaptive", [False, True])
def test_trajectory_equals_the_classic_implementation(adaptive):
    peer = load("STEPPE_CLASSIC_SAM").SAM
    models = make_twins()
    for model, cls in zip(models, (steppe.compat.SAM, peer), strict=True):
        options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
        optimizer = cls(model.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 7)
        for step in range(20):
            x, y = batch(step, dtype=torch.float64)
            F.cross_entropy(model(x), y).backward()
            optimizer.first_step(zero_grad=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)
            scheduler.step()
    assert_same(*models)


def test_trajectory_equals_the_official_asam():
    """Compare on parameters named "weight": for others the official code takes T = 1, unlike the paper's formula."""
    peer = load("STEPPE_OFFICIAL_ASAM").ASAM
    model, other = make_twins()
    optimizer = steppe.variants.asam(torch.optim.SGD(model.parameters(), lr=0.05), rho=0.5, eta=0.01, model=model)
    official = peer(torch.optim.SGD(other.parameters(), lr=0.05), other, rho=0.5, eta=0.01)
    for step in range(20):
        x, y = batch(step, dtype=torch.float64)
        by_passes(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        F.cross_entropy(other(x), y).backward()
        official.ascent_step()
        F.cross_entropy(other(x), y).backward()
        official.descent_step()
    assert_same(model, other)


def test_trajectory_equals_the_official_msam():
    """Compare without weight decay: the official code adds it at w + e, and Steppe's base at w."""
    peer = load("STEPPE_OFFICIAL_MSAM").MSAM
    model, other = make_twins()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = steppe.variants.msam(base, rho=0.3, model=model)
    official = peer(other.parameters(), lr=0.05, momentum=0.9, weight_decay=0.0, rho=0.3)
    for step in range(20):
        x, y = batch(step, dtype=torch.float64)
        by_passes(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        official.zero_grad()
        F.cross_entropy(other(x), y).backward()
        official.step()
    official.move_back_from_momentumAscent()  # the official code stays at w + e between steps
    assert_same(model, other)
