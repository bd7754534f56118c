"""For the tests of the recipes: an example as a namespace, and SAM by hand, without anything of Steppe."""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def recipe(name: str) -> SimpleNamespace:
    """What the example defines, without running its main part."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name="recipe"))


def smaller(name: str, *changes: tuple[str, str]) -> str:
    """The example's source with smaller numbers in it."""
    source = (EXAMPLES / name).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} is to be in {name} once"
        source = source.replace(old, new)
    return source


def sam_by_hand(
    model: nn.Module, base: Optimizer, rho: float, backward: Callable[[], Tensor], clip: float | None = None
) -> Tensor:
    """One step of SAM; ``backward`` makes a whole pass and returns its loss. Return the loss at w."""
    moved = [p for group in base.param_groups for p in group["params"]]
    start, kept = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    base.zero_grad()
    loss = backward()
    left, generator = [b.clone() for b in model.buffers()], torch.get_rng_state()
    with torch.no_grad():
        at_w = [p.clone() for p in moved]
        norm = torch.stack([p.grad.double().square().sum() for p in moved if p.grad is not None]).sum().sqrt()
        for p in moved:
            if p.grad is not None:
                p.add_(p.grad * (rho / norm).float())
        put(model, kept)
    torch.set_rng_state(start)
    base.zero_grad()
    backward()
    with torch.no_grad():
        for p, w in zip(moved, at_w, strict=True):
            p.copy_(w)
        put(model, left)
    torch.set_rng_state(generator)
    if clip is not None:
        nn.utils.clip_grad_norm_(moved, clip)
    base.step()
    return loss.detach()


@torch.no_grad()
def put(model: nn.Module, values: list[Tensor]) -> None:
    for buffer, value in zip(model.buffers(), values, strict=True):
        buffer.copy_(value)


def assert_same(model: nn.Module, reference: nn.Module, *, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    """Weights and buffers agree, each tensor relative to its largest entry."""
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        value, expected = value.double(), theirs[name].double()
        error = (value - expected).abs().max()
        assert error <= rtol * expected.abs().max() + atol, f"{name}: off by {error:.2e}"


def differ(model: nn.Module, reference: nn.Module) -> float:
    """The distance of the weights, relative to their size."""
    ours, theirs = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (model, reference))
    return float((ours - theirs).norm() / theirs.norm())
