"""Optimizers that keep their state in 8 or 4 bits as bases: bitsandbytes and torchao, on $STEPPE_DEVICE or a CPU."""

import contextlib
import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from steppe import SAM
from support import DRIVES, by_closure, every_drive, model_bits, saved_and_loaded

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
DEVICE = os.environ.get("STEPPE_DEVICE") or "cpu"
OPTIONS = {"SGD8bit": {"momentum": 0.9}, "LARS8bit": {"momentum": 0.9}}
QUANTIZED = {
    "bitsandbytes.optim": [
        "AdamW8bit",
        "Adam8bit",
        "AdEMAMix8bit",
        "Lion8bit",
        "SGD8bit",
        "RMSprop8bit",
        "Adagrad8bit",
        "LAMB8bit",
        "LARS8bit",
    ],
    "torchao.optim": ["AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8"],
}
if DEVICE != "cpu":  # on a CPU, bitsandbytes warns that it pages nothing
    QUANTIZED["bitsandbytes.optim"] += ["PagedAdamW8bit", "PagedLion8bit"]
every_quantized_base = pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in QUANTIZED.items() for name in names]
)


@pytest.fixture(autouse=True)
def eager():
    """On a CPU, do not compile torchao's steps, which takes seconds; test_published_bases.py compiles AdamW8bit."""
    with torch.compiler.set_stance("force_eager") if DEVICE == "cpu" else contextlib.nullcontext():
        yield


def network() -> nn.Module:
    """Return a network with a matrix that is large enough to be quantized, as smaller tensors are not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 1024), nn.Tanh(), nn.Dropout(0.2), nn.Linear(1024, 3)).to(DEVICE)


def base_of(package: str, name: str, model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    optimizer = getattr(pytest.importorskip(package), name)
    return optimizer(model.parameters(), lr=lr, **OPTIONS.get(name, {}))


def loss_of(model: nn.Module, step: int):
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=g).to(DEVICE), torch.randint(3, (16,), generator=g).to(DEVICE)
    return lambda: F.cross_entropy(model(x), y)


def bits_of(model: nn.Module) -> dict[str, bytes]:
    return model_bits(copy.deepcopy(model).cpu())


def train(model: nn.Module, optimizer: SAM, drive, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        drive(optimizer, loss_of(model, step))


def holds_quantized_state(optimizer: torch.optim.Optimizer) -> bool:
    """True if a state of the first matrix has no full precision: codes of bitsandbytes, a tensor class of torchao."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]].values()
    return any(
        isinstance(t, torch.Tensor) and (t.dtype == torch.uint8 or type(t).__name__.startswith("OptimState"))
        for t in state
    )


def gradient_by_hand(model: nn.Module, step: int, rho: float) -> list[torch.Tensor]:
    """Return g_s = grad L(w + rho g / |g|); restore w."""
    parameters, loss = list(model.parameters()), loss_of(model, step)
    torch.manual_seed(step)
    g = torch.autograd.grad(loss(), parameters)
    length = torch.cat([part.double().flatten() for part in g]).norm()
    w = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, part in zip(parameters, g, strict=True):
            p.add_(part, alpha=float(rho / length))
    torch.manual_seed(step)
    g_s = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        for p, value in zip(parameters, w, strict=True):
            p.copy_(value)
    return list(g_s)


@every_quantized_base
def test_each_step_is_two_passes_and_a_step_of_the_base(package, name):
    """Step a second base with the gradients of SAM, because quantization amplifies the rounding of those by hand."""
    model, twin = network(), network()
    optimizer, base = SAM(base_of(package, name, model), rho=0.5, model=model), base_of(package, name, twin)
    for step in range(5):
        by_hand = gradient_by_hand(twin, step, rho=0.5)
        train(model, optimizer, DRIVES["passes"], range(step, step + 1))
        for p, q, g_s in zip(model.parameters(), twin.parameters(), by_hand, strict=True):
            torch.testing.assert_close(p.grad, g_s, rtol=1e-3, atol=1e-6)
            q.grad = p.grad.clone()
        base.step()
        assert bits_of(model) == bits_of(twin)
    assert holds_quantized_state(optimizer)
    assert bits_of(model) != bits_of(network())


@every_drive
@every_quantized_base
def test_weights_are_restored_to_the_bit(package, name, drive):
    model = network()
    optimizer = SAM(base_of(package, name, model, lr=0.0), rho=0.5, model=model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    train(model, optimizer, DRIVES[drive], range(3))
    assert bits_of(model) == bits_of(network())


@every_quantized_base
def test_checkpoint_resumes_to_the_same_bits(package, name):
    def make(model, rho=0.1):
        base = base_of(package, name, model)
        return SAM(base, rho=rho, model=model, perturbation=steppe.VarianceSuppressed())

    straight, model = network(), network()
    train(straight, make(straight), by_closure, range(6))
    first = make(model)
    train(model, first, by_closure, range(3))
    state = saved_and_loaded(first.state_dict())
    second = make(model, rho=0.7)
    second.load_state_dict(state)
    assert second.rho == 0.1
    assert holds_quantized_state(second)
    train(model, second, by_closure, range(3, 6))
    assert bits_of(model) == bits_of(straight)


@every_quantized_base
def test_rho_0_is_the_base_bit_for_bit(package, name):
    model, twin = network(), network()
    train(model, SAM(base_of(package, name, model), rho=0.0, model=model), by_closure, range(5))
    base = base_of(package, name, twin)
    for step in range(5):
        torch.manual_seed(step)
        base.zero_grad()
        loss_of(twin, step)().backward()
        base.step()
    assert bits_of(model) == bits_of(twin)


def test_optimizer_of_torchao_that_steps_copies_of_the_weights_is_an_error():
    """CPUOffloadOptimizer trains copies on the host, which SAM would perturb in place of the model's weights."""
    kind = pytest.importorskip("torchao.optim").CPUOffloadOptimizer
    optimizer = kind.__new__(kind)  # its constructor needs a GPU; neither does it call that of torch
    optimizer.d_param_groups, optimizer.optim_dict = [{"params": list(network().parameters())}], {}
    with pytest.raises(TypeError, match="CPUOffloadOptimizer cannot be the base: it has no state"):
        SAM(optimizer, rho=0.1)
