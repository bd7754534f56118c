"""Trajectories against the authors' code, where an environment variable names a copy of it.

STEPPE_OFFICIAL_WSAM: atorch/optimizers/wsam.py of github.com/intelligent-machine-learning/atorch.
STEPPE_OFFICIAL_LOOKBEHIND: lookbehind.py of github.com/chandar-lab/Lookbehind-SAM.
STEPPE_OFFICIAL_UNIFIED_SAM: unifiedsam.py of github.com/dimitris-oik/unifiedsam.
STEPPE_OFFICIAL_STABLE_SAM: sam.py of github.com/cltan023/stablesam2024.
STEPPE_OFFICIAL_SANER: optimizer/saner.py of github.com/lhchau/saner.
STEPPE_OFFICIAL_SAGM: domainbed/sagm/sagm.py of github.com/Wang-pengfei/SAGM.
STEPPE_OFFICIAL_LE_SAM: lesam.py of github.com/smithgun2005/LE-SAM-ICML2026.
STEPPE_OFFICIAL_SASSHA: optimizers/sassha.py of github.com/LOG-postech/Sassha.
"""

import sys
import types

import pytest
import torch
from own_step_problem import STABLE_BASES, assert_close, flat, loss, start, trained

from checks import split
from peer_copies import load
from steppe import variants
from steppe._tensors.random import integers
from steppe.methods.lookbehind_sam import Lookbehind
from steppe.methods.sassha import SASSHA
from steppe.methods.wsam import DecoupledWSAM


def module() -> torch.nn.Module:
    theirs = torch.nn.Module()
    for index, part in enumerate(split(start())):
        theirs.register_parameter(f"weight{index}", torch.nn.Parameter(part))
    return theirs


def value(theirs: torch.nn.Module, t: int) -> torch.Tensor:
    return loss(flat(theirs.parameters()), t)


@pytest.mark.parametrize("base", STABLE_BASES)
def test_decoupled_wsam_matches_the_official_code(base, monkeypatch):
    utils = types.SimpleNamespace(enable_running_stats=lambda m: None, disable_running_stats=lambda m: None)
    monkeypatch.setitem(sys.modules, "atorch", types.ModuleType("atorch"))
    monkeypatch.setitem(sys.modules, "atorch.optimizers", types.ModuleType("atorch.optimizers"))
    monkeypatch.setitem(sys.modules, "atorch.optimizers.utils", utils)
    official = load("STEPPE_OFFICIAL_WSAM").WeightedSAM
    theirs = module()
    optimizer = official(theirs, STABLE_BASES[base](theirs.parameters()), rho=0.3, gamma=0.7, max_norm=None)
    for t in range(20):

        def closure(t=t):
            optimizer.zero_grad()
            value(theirs, t).backward()

        optimizer.step(closure)
    ours = trained(lambda ps: DecoupledWSAM(STABLE_BASES[base](ps), 0.3, gamma=0.7))
    # the official code restores w by a subtraction and adds 1e-12 to the norm
    torch.testing.assert_close(ours, flat(theirs.parameters()).detach(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("k", "alpha"), [(3, 0.4), (2, None)])
@pytest.mark.parametrize("base", STABLE_BASES)
def test_lookbehind_matches_the_official_code(base, k, alpha):
    official = load("STEPPE_OFFICIAL_LOOKBEHIND").LookbehindSAM
    theirs = module()
    chosen = -1 if alpha is None else alpha
    minimizer = official(STABLE_BASES[base](theirs.parameters()), theirs, rho=0.1, k_steps=k, alpha=chosen)
    for t in range(20):
        for _ in range(k):
            value(theirs, t).backward()
            minimizer.ascent_step()
            value(theirs, t).backward()
            minimizer.descent_step()
    minimizer._backup_and_load_slow_cache()
    ours = trained(lambda ps: Lookbehind(STABLE_BASES[base](ps), 0.1, ascent_steps=k, alpha=alpha))
    assert_close(ours, flat(theirs.parameters()).detach())


def by_closure(optimizer: torch.optim.Optimizer, theirs: torch.nn.Module) -> torch.Tensor:
    """The weights after 20 steps with an optimizer that has the passes of davda54/sam."""
    for t in range(20):
        optimizer.zero_grad()
        value(theirs, t).backward()
        optimizer.first_step(zero_grad=True)
        value(theirs, t).backward()
        optimizer.second_step(zero_grad=True)
    return flat(theirs.parameters()).detach()


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0, "1/t", "1-1/t"])
def test_unified_sam_matches_the_official_code(lmbda):
    official = load("STEPPE_OFFICIAL_UNIFIED_SAM").unifiedSAM
    theirs, options = module(), {"lr": 0.01, "momentum": 0.9}
    want = by_closure(official(theirs.parameters(), torch.optim.SGD, rho=0.1, lambd=lmbda, **options), theirs)
    ours = trained(lambda ps: variants.unified_sam(torch.optim.SGD(ps, **options), 0.1, lmbda=lmbda))
    # the official code adds 1e-12 to the norm
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("base", STABLE_BASES)
def test_stable_sam_matches_the_official_code(base):
    official = load("STEPPE_OFFICIAL_STABLE_SAM").SAM
    theirs = module()
    want = by_closure(official(STABLE_BASES[base](theirs.parameters()), rho=0.1, stable=True), theirs)
    ours = trained(lambda ps: variants.stable_sam(STABLE_BASES[base](ps), 0.1))
    # the official code adds 1e-12 to both norms
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-11)


def test_saner_matches_the_official_code():
    official = load("STEPPE_OFFICIAL_SANER").SANER
    theirs, options = module(), {"lr": 0.004, "momentum": 0.9, "weight_decay": 1e-3}
    want = by_closure(official(theirs.parameters(), rho=0.1, alpha=0.3, **options), theirs)
    ours = trained(lambda ps: variants.saner(torch.optim.SGD(ps, **options), 0.1, alpha=0.7))
    # the official code adds 1e-12 to the norm and restores w by a subtraction
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("base", STABLE_BASES)
def test_sagm_matches_the_official_code(base, monkeypatch):
    utils = types.SimpleNamespace(enable_running_stats=lambda m: None, disable_running_stats=lambda m: None)
    monkeypatch.setitem(sys.modules, "sagm", types.ModuleType("sagm"))
    monkeypatch.setitem(sys.modules, "sagm.util", utils)
    official = load("STEPPE_OFFICIAL_SAGM", package="sagm").SAGM
    theirs = module()
    inner, rho = STABLE_BASES[base](theirs.parameters()), types.SimpleNamespace(step=lambda: 0.1)
    optimizer = official(theirs.parameters(), inner, theirs, alpha=0.05, rho_scheduler=rho)
    for t in range(20):

        @torch.enable_grad()
        def closure(t=t):
            optimizer.zero_grad()
            value(theirs, t).backward()
            return None, None

        optimizer.step(closure)
    ours = trained(lambda ps: variants.sagm(STABLE_BASES[base](ps), 0.1, alpha=0.5))
    # the official code adds 1e-12 to the norm and restores w by a subtraction
    torch.testing.assert_close(ours, flat(theirs.parameters()).detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rho_max", [0.02, 999.0])
def test_le_sam_matches_the_official_code(rho_max, monkeypatch):
    # the optimizer is in the training script, whose imports it does not need
    names = {
        "torch.utils.tensorboard": "SummaryWriter",
        "model.smooth_cross_entropy": "smooth_crossentropy trades_loss",
        "utils.cifar": "Cifar Cifar100",
        "utils.log": "Log",
        "utils.initialize": "initialize",
        "utils.step_lr": "StepLR",
        "utils.options": "args setup_model",
        "utils.MiscTools": "count_parameters",
        "utils.dist_util": "get_world_size",
    }
    for name, imported in names.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**dict.fromkeys(imported.split())))
    for package in ("model", "utils"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    official = load("STEPPE_OFFICIAL_LE_SAM").LESAM
    theirs, options = module(), {"lr": 0.004, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer = official(theirs.parameters(), torch.optim.SGD, sigma=0.35, rho_max=rho_max, **options)
    for t in range(20):
        value(theirs, t).backward()
        optimizer.ascent_step()
        value(theirs, t).backward()
        optimizer.descent_step()
    ours = trained(lambda ps: variants.le_sam(torch.optim.SGD(ps, **options), 0.35, rho_max=rho_max))
    # the official code adds 1e-12 to the norm and to its square, and restores w by a subtraction
    torch.testing.assert_close(ours, flat(theirs.parameters()).detach(), rtol=1e-11, atol=1e-11)


def test_sassha_matches_the_official_code(monkeypatch):
    official = load("STEPPE_OFFICIAL_SASSHA").SASSHA
    theirs = module()
    options = {"lr": 0.004, "betas": (0.8, 0.95), "eps": 0.05, "weight_decay": 0.1}
    optimizer = official(theirs.parameters(), rho=0.1, lazy_hessian=3, **options)
    optimizer.hessian_power_scheduler = types.SimpleNamespace(step=lambda: 0.5)
    for t in range(20):
        value(theirs, t).backward()
        optimizer.perturb_weights(zero_grad=True)
        gradients = torch.autograd.grad(value(theirs, t), list(theirs.parameters()), create_graph=True)
        for p, g in zip(theirs.parameters(), gradients, strict=True):
            p.grad = g  # as by backward(create_graph=True), which warns
        # the graph holds copies of the weights (flat): else the estimate in step() would not be that at w + e
        optimizer.unperturb()
        signs = iter(integers("SASSHA", 0, t, split(start()), below=2))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, signs=signs, **__: next(signs).double())
            optimizer.step()
        optimizer.zero_grad()
    ours = trained(lambda ps: SASSHA(ps, rho=0.1, interval=3, **options))
    # the official code adds 1e-12 to the norm and restores w by a subtraction
    torch.testing.assert_close(ours, flat(theirs.parameters()).detach(), rtol=1e-10, atol=1e-10)
