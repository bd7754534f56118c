"""SAM written out, without Steppe: the reference for the examples."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def sam_by_hand(
    model: nn.Module, base: Optimizer, rho: float, backward: Callable[[], Tensor], clip: float | None = None
) -> Tensor:
    """Take one step of SAM; return the loss at w. ``backward`` runs a whole pass and returns its loss."""
    weights = [p for group in base.param_groups for p in group["params"]]
    rng_before, buffers_before = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    base.zero_grad()
    loss = backward()
    buffers_after, rng_after = [b.clone() for b in model.buffers()], torch.get_rng_state()
    with torch.no_grad():
        at_w = [p.clone() for p in weights]
        norm = torch.stack([p.grad.double().square().sum() for p in weights if p.grad is not None]).sum().sqrt()
        for p in weights:
            if p.grad is not None:
                p.add_(p.grad * (rho / norm).float())
        copy_to_buffers(model, buffers_before)
    torch.set_rng_state(rng_before)
    base.zero_grad()
    backward()
    with torch.no_grad():
        for p, w in zip(weights, at_w, strict=True):
            p.copy_(w)
        copy_to_buffers(model, buffers_after)
    torch.set_rng_state(rng_after)
    if clip is not None:
        nn.utils.clip_grad_norm_(weights, clip)
    base.step()
    return loss.detach()


@torch.no_grad()
def copy_to_buffers(model: nn.Module, values: list[Tensor]) -> None:
    for buffer, value in zip(model.buffers(), values, strict=True):
        buffer.copy_(value)


def assert_close(model: nn.Module, reference: nn.Module, *, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    """Compare weights and buffers, each tensor relative to its largest entry."""
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        value, expected = value.double(), theirs[name].double()
        error = (value - expected).abs().max()
        assert error <= rtol * expected.abs().max() + atol, f"{name}: off by {error:.2e}"


def relative_distance(model: nn.Module, reference: nn.Module) -> float:
    """Return the distance of the weights, relative to their norm."""
    ours, theirs = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (model, reference))
    return float((ours - theirs).norm() / theirs.norm())
