"""Every optimizer of torch.optim as the base, with the inputs of PyTorch's own optimizer test database."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from support import bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations within torch's own module
    from torch.testing._internal.common_optimizers import optim_db

from steppe import SAM

# Optimizers that cannot be the base, and the error that each raises.
UNSUPPORTED = {
    "LBFGS": (TypeError, "LBFGS cannot be the base: its step needs a closure"),
    "SparseAdam": (RuntimeError, "sparse gradient"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*`lr` is a Tensor.*:UserWarning"),
]


def implementations(info):
    yield "for-loop", {"foreach": False} if "foreach" in info.supported_impls else {}
    if "foreach" in info.supported_impls:
        yield "foreach", {"foreach": True}
    if "fused" in info.supported_impls and "cpu" in info.supports_fused_on:
        yield "fused", {"fused": True}


def cases():
    """Yield the inputs of each optimizer, with its implementations in turn: SAM is the same around each of them."""
    for info in optim_db:
        if info.optim_cls.__name__ in UNSUPPORTED:
            continue
        in_turn = itertools.cycle(implementations(info))
        left = {name for name, _ in implementations(info)}
        for case in info.optim_inputs_func(device="cpu"):
            name, option = next(in_turn)
            if name == "foreach" and isinstance(case.kwargs.get("lr"), torch.Tensor):
                name, option = next(in_turn)  # torch itself raises for this pair
            left.discard(name)
            identifier = f"{info.optim_cls.__name__}-{case.desc}-{name}"
            yield pytest.param(info.optim_cls, {**case.kwargs, **option}, id=identifier)
        assert not left, f"{info.optim_cls.__name__}: no input for {left}"


CASES = list(cases())


def parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3, generator=g)), nn.Parameter(torch.randn(3, 3, generator=g))]


def L(params: list[nn.Parameter]) -> torch.Tensor:
    return torch.sin(params[0] @ params[1]).square().sum() + params[1].square().sum() * 0.1


def closure_of(optimizer, params):
    def closure():
        optimizer.zero_grad()
        loss = L(params)
        loss.backward()
        return loss

    return closure


def fresh(optim_cls, kwargs):
    params = parameters()
    kwargs = copy.deepcopy(kwargs)
    return params, optim_cls(params, **kwargs)


@pytest.mark.parametrize(("optim_cls", "kwargs"), CASES)
def test_rho_zero_equals_the_base_optimizer_bit_for_bit(optim_cls, kwargs):
    params, base = fresh(optim_cls, kwargs)
    plain, baseline = fresh(optim_cls, kwargs)
    sam = SAM(base, rho=0.0)
    for _ in range(5):
        sam.step(closure_of(sam, params))
        baseline.step(closure_of(baseline, plain))
    assert bits(params) == bits(plain)
    assert bits(plain) != bits(parameters()), "the baseline must change the weights"


@pytest.mark.parametrize(("optim_cls", "kwargs"), CASES)
def test_base_steps_from_w_with_the_gradient_at_w_plus_e(optim_cls, kwargs):
    params, base = fresh(optim_cls, kwargs)
    reference, baseline = fresh(optim_cls, kwargs)
    sam = SAM(base, rho=0.3)
    sign = -1.0 if kwargs.get("maximize") else 1.0
    for _ in range(5):
        sam.step(closure_of(sam, params))
        g = torch.autograd.grad(L(reference), reference)
        n = torch.cat([t.reshape(-1) for t in g]).double().norm()
        perturbed = [
            (p.detach() + sign * 0.3 * t / n).float().requires_grad_() for p, t in zip(reference, g, strict=True)
        ]
        for p, t in zip(reference, torch.autograd.grad(L(perturbed), perturbed), strict=True):
            p.grad = t
        baseline.step()
    for p, q in zip(params, reference, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("optim_cls", "kwargs"), CASES)
def test_checkpoints_and_copies_take_the_identical_next_step(optim_cls, kwargs):
    params, base = fresh(optim_cls, kwargs)
    sam = SAM(base, rho=0.2)
    for _ in range(3):
        sam.step(closure_of(sam, params))
    params2, sam2 = copy.deepcopy((params, sam))
    params3, base3 = fresh(optim_cls, kwargs)
    with torch.no_grad():
        for p, q in zip(params3, params, strict=True):
            p.copy_(q)
    sam3 = SAM(base3, rho=0.9)
    sam3.load_state_dict(copy.deepcopy(sam.state_dict()))
    for optimizer, ps in ((sam, params), (sam2, params2), (sam3, params3)):
        for _ in range(2):
            optimizer.step(closure_of(optimizer, ps))
    assert bits(params) == bits(params2) == bits(params3)


@pytest.mark.parametrize("info", optim_db, ids=lambda i: i.optim_cls.__name__)
def test_every_torch_optimizer_is_tested_or_raises_with_the_reason(info):
    name = info.optim_cls.__name__
    if name not in UNSUPPORTED:
        assert any(name in str(case.id) for case in CASES)
        return
    error, message = UNSUPPORTED[name]
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        optimizer = SAM(info.optim_cls([w]))
        for sam_pass in optimizer.passes():
            with sam_pass:
                w.grad = torch.ones(2).to_sparse()
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("info", optim_db, ids=lambda i: i.optim_cls.__name__)
def test_wrong_arguments_of_the_base_raise_the_error_of_the_base(info):
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        if case.error_on.name != "CONSTRUCTION_ERROR" or info.optim_cls is torch.optim.Adadelta:
            continue  # Adadelta has no class form: see C5
        params = case.optimizer_error_input.params
        if isinstance(params, torch.Tensor) or params is None or not list(params):
            continue  # SAM raises its own error: see C9
        with pytest.raises(case.error_type):
            SAM(params, info.optim_cls, **case.optimizer_error_input.kwargs)
