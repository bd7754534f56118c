"""The weights and buffers of the current model and of other checkpoints of the same network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steppe.flatness._forward import check_not_sharded
from steppe.flatness.objective import Objective

Other: TypeAlias = nn.Module | Mapping[str, Tensor] | Tensor
"""Another checkpoint of the same network: a model, its state dict, or its weights as a vector (n,)."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights, (n,), with the buffers that belong to them as far as they are known."""

    weights: Tensor
    buffers: dict[str, Tensor]


def current_checkpoint(objective: Objective) -> Checkpoint:
    """Copy the current weights and buffers of the model."""
    return Checkpoint(objective.weights, {k: b.clone() for k, b in objective.model.named_buffers()})


def read_checkpoint(objective: Objective, other: Other) -> Checkpoint:
    """Read another checkpoint, and check that it belongs to the same network.

    Raises:
        TypeError: ``other`` is sharded, or not a model, a state dict or a vector.
        ValueError: Other names or shapes, or a difference in parameters that are not among the weights.
    """
    if isinstance(other, Tensor):
        check_not_sharded({"other": other})
        return Checkpoint(objective.flatten(objective.unflatten(other.detach())), {})
    theirs, ours = _named_tensors(other), _all_names(objective.model)
    needed = {k for k, _ in objective.model.named_parameters()} | (
        {k for k, _ in objective.model.named_buffers()} & set(objective.model.state_dict())
    )
    _check_names(needed, set(ours), set(theirs))
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            raise ValueError(
                f"other: {name} has shape {tuple(tensor.shape)}, but {tuple(ours[name].shape)} in this model: weights "
                "can be interpolated only between networks of the same shapes"
            )
    for name, p in objective.model.named_parameters():
        if name not in objective.names and not torch.equal(p, theirs[name].to(p)):
            raise ValueError(
                f"other: {name} differs, but is not among the weights of this objective and would not be "
                "interpolated: add it to parameters=, or load the same values into both"
            )
    weights = objective.flatten([theirs[k].detach() for k in objective.names])
    return Checkpoint(weights, {k: theirs[k].to(b) for k, b in objective.model.named_buffers() if k in theirs})


def _named_tensors(other: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(other, DistributedDataParallel):
        other = other.module
    if isinstance(other, nn.Module):
        check_not_sharded(other)
        return _all_names(other)
    if isinstance(other, Mapping):
        check_not_sharded(other)
        return {k: v for k, v in other.items() if isinstance(v, Tensor) and not k.endswith("_extra_state")}
    raise TypeError(f"other is {type(other).__name__}: pass a model, its state dict, or its weights as a vector (n,)")


def _all_names(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by all of their names; a tied one has several in a state dict."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _check_names(needed: set[str], known: set[str], given: set[str]) -> None:
    missing, unexpected = sorted(needed - given), sorted(given - known)
    if missing or unexpected:
        problems = ((missing, "missing"), (unexpected, "unexpected"))
        listed = [f"{', '.join(names[:3])} {problem}" for names, problem in problems if names]
        raise ValueError(
            f"other: {'; '.join(listed)}. Weights can be interpolated only between networks of the same architecture, "
            "neither inside DistributedDataParallel or torch.compile, which add a prefix to the names"
        )
