"""Optimizers of other packages as bases (C31): rho = 0 is the base bit for bit, steps are SAM's, checkpoints resume."""

import functools
import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision_stand_in import torchvision_stand_in

import steppe
from steppe import SAM
from support import bits, by_closure, by_passes, model_bits, plain, rest_is_slow, saved_and_loaded


def network(base: str) -> nn.Module:
    """Return a network; for optimizers that keep 8 bits for large tensors only, one with such tensors."""
    torch.manual_seed(0)
    width = 1024 if "8-bit" in base else 8
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def train(model: nn.Module, optimizer, drive, steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)
        torch.manual_seed(step)
        drive(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))


def muon_and_adamw(model):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return [
        torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01),
    ]


def of_package(package, name, **options):
    def make(model):
        module = pytest.importorskip(package)
        optimizer = functools.reduce(getattr, name.split("."), module)(model.parameters(), **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def timm_optim():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with torchvision_stand_in():
        return importlib.import_module("timm.optim")


def of_timm(name, **options):
    def make(model):
        return timm_optim().create_optimizer_v2(model, opt=name, lr=0.01, **options)

    return make


def around_adamw(package, name, **options):
    """A wrapper of AdamW, such as Lookahead."""

    def make(model):
        module = pytest.importorskip(package)
        optimizer = getattr(module, name)(torch.optim.AdamW(model.parameters(), lr=0.01), **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def timm_lookahead(model):
    return timm_optim().Lookahead(torch.optim.AdamW(model.parameters(), lr=0.01), k=2)


POPULAR = ["Lion", "AdaBelief", "Adan", "Lamb", "SOAP", "Prodigy", "StableAdamW", "CAME", "RAdam", "AdEMAMix", "ADOPT"]
BASES = {
    "Muon and AdamW": muon_and_adamw,
    "schedule-free SGD": of_package("schedulefree", "SGDScheduleFree", lr=0.1),
    "schedule-free AdamW": of_package("schedulefree", "AdamWScheduleFree", lr=0.01),
    "torchao's 8-bit AdamW": of_package("torchao.optim", "AdamW8bit", lr=0.01),
    "bitsandbytes' 8-bit AdamW": of_package("bitsandbytes.optim", "AdamW8bit", lr=0.01),
    **{f"timm's {name}": of_timm(name) for name in ("adamp", "lamb", "lion", "adan", "madgrad", "lookahead_adamw")},
    "timm's Lookahead": timm_lookahead,
    **{f"pytorch_optimizer's {name}": of_package("pytorch_optimizer", name, lr=0.01) for name in POPULAR},
    "pytorch_optimizer's Lookahead": around_adamw("pytorch_optimizer", "Lookahead", k=2),
    "pytorch_optimizer's schedule-free wrapper": around_adamw("pytorch_optimizer", "ScheduleFreeWrapper"),
    "pytorch_optimizer's TRAC": around_adamw("pytorch_optimizer", "TRAC"),
    "pytorch_optimizer's OrthoGrad": around_adamw("pytorch_optimizer", "OrthoGrad"),
}
COMPILED = ("torchao's 8-bit AdamW",)  # which takes seconds; test_quantized_bases.py has it without compilation
every_base = pytest.mark.parametrize("base", rest_is_slow(BASES, lambda b: b not in COMPILED))
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def each(bases):
    return bases if isinstance(bases, list) else [bases]


@every_base
def test_c31_rho_0_is_the_base_bit_for_bit(base):
    model, twin = network(base), network(base)
    optimizer, bases = SAM(BASES[base](model), rho=0.0, model=model), each(BASES[base](twin))

    def of_all(_, loss):
        for one in bases:
            one.zero_grad()
        loss().backward()
        for one in bases:
            one.step()

    train(model, optimizer, by_passes, range(5))
    train(twin, None, of_all, range(5))
    assert model_bits(model) == model_bits(twin)


@every_base
def test_c31_step_is_two_passes_and_a_step_of_the_base(base):
    model, twin = network(base), network(base)
    optimizer, bases = SAM(BASES[base](model), rho=0.1, model=model), each(BASES[base](twin))

    def by_hand(_, loss):
        parameters = list(twin.parameters())
        gradients = torch.autograd.grad(loss(), parameters)
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        saved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g, alpha=float(0.1 / norm))
        for p, g in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
            p.grad = g
        with torch.no_grad():
            for p, w in zip(parameters, saved, strict=True):
                p.copy_(w)
        for one in bases:
            one.step()

    train(model, optimizer, by_closure, range(1))
    train(twin, None, by_hand, range(1))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@every_base
def test_c31_checkpoint_resumes_bit_for_bit(base):
    def make(model, rho=0.1):
        return SAM(BASES[base](model), rho=rho, model=model, perturbation=steppe.VarianceSuppressed())

    straight, model = network(base), network(base)
    optimizer = make(straight)
    train(straight, optimizer, by_closure, range(6))
    first = make(model)
    train(model, first, by_closure, range(3))
    state = saved_and_loaded(first.state_dict(), weights_only=False)
    second = make(model, rho=0.7)
    second.load_state_dict(state)
    assert second.rho == 0.1
    train(model, second, by_closure, range(3, 6))
    assert model_bits(model) == model_bits(straight)


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree"])
def test_c31_eval_gives_the_averaged_weights_of_a_schedule_free_base_and_train_returns(name):
    model = network(name)
    base = of_package("schedulefree", name, lr=0.05)(model)
    optimizer = SAM(base, rho=0.1, model=model)
    train(model, optimizer, by_closure, range(4))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    assert not base.param_groups[0]["train_mode"]
    assert bits(before) != bits(model.parameters())
    optimizer.train()
    for p, w in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, w)
    optimizer.eval()
    with pytest.raises(Exception, match="train mode"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, plain, range(1))
