"""Tests of the most important guarantees, on the device named by $STEPPE_DEVICE. They pass on a CPU, too.

STEPPE_DEVICE=cuda python -m pytest benchmarks/gpu/device_checks.py
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import steppe  # noqa: E402
from support import BASES, DRIVES, batch, net  # noqa: E402

DEVICE = os.environ.get("STEPPE_DEVICE", "cpu")
every_drive = pytest.mark.parametrize("drive", DRIVES)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Make results deterministic, because bits are compared."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def network(dropout: float = 0.3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the tests' network with BatchNorm and dropout."""
    return net(dropout=dropout, dtype=dtype).to(DEVICE)


def images(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the batch of a step."""
    x, y = batch(step, dtype=dtype)
    return x.to(DEVICE), y.to(DEVICE)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, drive: str, steps: range, forward: Callable | None = None
) -> None:
    """Take steps in the model's precision; `forward` is called instead of the model if given."""
    for step in steps:
        x, y = images(step, next(model.parameters()).dtype)
        DRIVES[drive](
            optimizer, lambda x=x, y=y: F.cross_entropy((model if forward is None else forward)(x).float(), y)
        )


def state(model: nn.Module) -> list[Tensor]:
    """Return copies of all weights and buffers."""
    return [t.detach().clone() for t in model.state_dict().values()]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Return True if all bits are the same."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_drive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_bit_for_bit_in_the_same_storage(drive, dtype):
    """With lr = 0, a step changes no bit of the weights."""
    model = network(dtype=dtype)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.7, model=model)
    before = [(p.detach().clone(), p.data_ptr()) for p in model.parameters()]
    train(model, optimizer, drive, range(3))
    for p, (value, address) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.data_ptr() == address


@every_drive
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_equals_the_base_optimizer(base, drive):
    """Compare bits, with dropout and BatchNorm in the model; check that another rho differs."""
    found = []
    for rho in (None, 0.0, 0.3):
        model = network()
        optimizer = BASES[base](model.parameters())
        if rho is not None:
            optimizer = steppe.SAM(optimizer, rho=rho, model=model)
        torch.manual_seed(3)
        train(model, optimizer, drive if rho is not None else "closure", range(4))
        found.append(state(model))
    assert same(found[1], found[0])
    assert not same(found[2], found[0])


@pytest.mark.parametrize("base", BASES)
def test_training_resumed_from_a_checkpoint_is_bit_identical(base, tmp_path):
    """Save and load weights, optimizer and generators after two of five steps."""
    found = []
    for from_checkpoint in (False, True):
        model = network()
        optimizer = steppe.SAM(BASES[base](model.parameters()), rho=0.1, model=model)
        torch.manual_seed(3)
        train(model, optimizer, "passes", range(2))
        if from_checkpoint:
            rng = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
            torch.save((model.state_dict(), optimizer.state_dict(), rng), tmp_path / "checkpoint.pt")
            weights, known, rng = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            model = network()
            optimizer = steppe.SAM(BASES[base](model.parameters()), rho=0.1, model=model)
            model.load_state_dict(weights)
            optimizer.load_state_dict(known)
            (torch.cuda.set_rng_state if DEVICE == "cuda" else torch.set_rng_state)(rng)
        train(model, optimizer, "passes", range(2, 5))
        found.append(state(model))
    assert same(found[1], found[0])


def by_hand(model: nn.Module, loss: Callable[[], Tensor], scale: float, rho: float) -> None:
    """Make the two passes of SAM one tensor at a time, and write the update gradient to .grad."""
    parameters = list(model.parameters())
    g = [d.float() / scale for d in torch.autograd.grad(loss() * scale, parameters)]
    after = copy.deepcopy(dict(model.named_buffers()))
    w, length = [p.detach().clone() for p in parameters], torch.cat([d.flatten() for d in g]).norm()
    with torch.no_grad():
        for p, d in zip(parameters, g, strict=True):
            p.add_(d * (rho / length))
    g_s = torch.autograd.grad(loss() * scale, parameters)
    with torch.no_grad():
        for p, value, d in zip(parameters, w, g_s, strict=True):
            p.copy_(value)
            p.grad = d / scale
        for name, value in model.named_buffers():
            value.copy_(after[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_matches_a_hand_written_loop(dtype):
    """Compare float16 with a loss scaler, and bfloat16 without one, with both passes written by hand.

    The twin's second pass counts one more batch, which would change an average over all batches; so both models average
    by a momentum.
    """
    model, twin = network(dropout=0.0), network(dropout=0.0)
    for each in (model, twin):
        each.layers[4].momentum = 0.1
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=dtype is torch.float16)
    optimizer = steppe.SAM(BASES["momentum"](model.parameters()), rho=0.3, model=model, scaler=scaler)
    base = BASES["momentum"](twin.parameters())

    def loss(of: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=dtype):
            return F.cross_entropy(of(x), y)

    for step in range(3):
        x, y = images(step)
        for sam_pass in optimizer.passes():
            with sam_pass:
                scaler.scale(loss(model, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()
        by_hand(twin, lambda x=x, y=y: loss(twin, x, y), 2.0**10 if scaler.is_enabled() else 1.0, 0.3)
        base.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("overflow", ["w", "w + e"])
def test_overflow_in_either_pass_skips_the_step(overflow):
    """Check that no bit of weights and momentum changes, and that the scale is halved."""
    model = network()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    optimizer = steppe.SAM(BASES["momentum"](model.parameters()), rho=0.1, model=model, scaler=scaler)
    for bad in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        momentum = copy.deepcopy(optimizer.base.state_dict()["state"])
        x, y = images(0)
        for sam_pass in optimizer.passes():
            with sam_pass:
                factor = float("inf") if bad and sam_pass.is_perturbed == (overflow == "w + e") else 1.0
                scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same([p.detach() for p in model.parameters()], before) == bad
    after = optimizer.base.state_dict()["state"]
    assert all(torch.equal(after[k]["momentum_buffer"], momentum[k]["momentum_buffer"]) for k in momentum)
    assert scaler.get_scale() == 2.0**9


def test_compiled_model_trains_like_an_eager_one():
    """Compare with a compiled model, whose code must read the weights that SAM has changed in place."""
    found = []
    for compiled in (False, True):
        model = network(dropout=0.0)
        forward = torch.compile(model, backend="inductor" if DEVICE == "cuda" else "aot_eager") if compiled else model
        optimizer = steppe.SAM(BASES["momentum"](model.parameters()), rho=0.3, model=model)
        train(model, optimizer, "passes", range(4), forward)
        found.append(state(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
