"""SAM's part of a checkpoint, stored inside the base optimizer's, so that either can load the other's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.groups import RHO, parameters_of
from steppe.rules import Memory

STEP = "sam_step"
"""The key of SAM's step counter in the groups of a checkpoint."""
_MEMORY_BEFORE_STEPS = "sam_memory_before_steps"
"""In the groups of a checkpoint at step 0 whose memory a rule has made, such as an eigenvector, and is no template."""
_OF_GROUPS = (STEP, _MEMORY_BEFORE_STEPS)
_MEMORY = "sam."
"""Prefix of a rule's tensors in the state of a parameter: ``sam.<rule>.<key>``."""
_MEMORY_APART = "sam.memory"
"""The rules' tensors by parameter, in a checkpoint that has no such state."""


class MemoryTemplate(dict[str, dict[Tensor, dict[str, Tensor]]]):
    """Names and shapes of the memory that the rules will have, for a checkpoint before the first step."""


def pack(base: Optimizer, memory: Memory, step: int) -> dict[str, Any]:
    """Return the base's checkpoint with the step counter in its groups and the rules' memory in its state.

    It adds only tensors and numbers, one level deep: ``torch.distributed.checkpoint`` and ``weights_only=True`` accept
    nothing else. In a checkpoint of another form (wrappers such as Lookahead), they are beside the base's entries.

    Before the first step, a :class:`MemoryTemplate` only shows names and shapes, and loading drops it.
    """
    packed: dict[str, Any] = base.state_dict()
    of_rules = {
        index: {
            f"{_MEMORY}{rule}.{key}": _to_number(value)
            for rule, own in memory.items()
            for key, value in own.get(parameter, {}).items()
        }
        for index, parameter in enumerate(parameters_of(base))
    }
    of_rules = {index: entries for index, entries in of_rules.items() if entries}
    if not _has_usual_form(packed):
        return {**packed, STEP: step, RHO: [group[RHO] for group in base.param_groups], _MEMORY_APART: of_rules}
    own = {STEP: step}
    if not step and of_rules and not isinstance(memory, MemoryTemplate):
        own[_MEMORY_BEFORE_STEPS] = True
    packed["param_groups"] = [{**group, **own} for group in packed["param_groups"]]
    packed["state"] = dict(packed["state"])
    for index, entries in of_rules.items():
        packed["state"][index] = {**packed["state"].get(index, {}), **entries}
    return packed


def with_own_part(state_dict: dict[str, Any], flattened: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with SAM's part of the flattened one from which ``torch.distributed.checkpoint`` made it.

    Torch leaves this part out, because the groups and the state of the optimizer do not have it.

    Args:
        state_dict: A checkpoint whose parameters are names.
        flattened: The values, by ``param_groups.<name>.<key>`` and ``state.<name>.<key>``.
    """
    memory = [key for key in flattened if f".{_MEMORY}" in key]
    groups, state = [], dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        names = group["params"]
        own = {key: flattened.get(f"param_groups.{name}.{key}") for name in names[:1] for key in _OF_GROUPS}
        groups.append({**group, **{key: value for key, value in own.items() if value is not None}})
        for name in names:
            prefix = f"state.{name}."
            entries = {key.removeprefix(prefix): flattened[key] for key in memory if key.startswith(prefix + _MEMORY)}
            if entries:
                state[name] = {**state.get(name, {}), **entries}
    return {**state_dict, "state": state, "param_groups": groups}


def unpack(state_dict: dict[str, Any], base: Optimizer) -> tuple[dict[str, Any], Memory, int]:
    """Split a checkpoint into the base's part, the rules' memory and the step counter.

    The base must not see SAM's part: some bases drop unknown entries, because they shard their state over the ranks or
    wrap another optimizer.
    """
    memory = Memory()
    if not _has_usual_form(state_dict):
        own = {key: value for key, value in state_dict.items() if key not in (STEP, RHO, _MEMORY_APART)}
        for index, parameter in enumerate(parameters_of(base)):
            _add_to_memory(memory, parameter, state_dict.get(_MEMORY_APART, {}).get(index, {}))
        return own, memory, state_dict.get(STEP, 0)
    groups = state_dict["param_groups"]
    step = max((group.get(STEP, 0) for group in groups), default=0)
    is_memory = step > 0 or any(_MEMORY_BEFORE_STEPS in group for group in groups)
    state = dict(state_dict["state"])
    indices = [index for group in groups for index in group["params"]]
    for index, parameter in zip(indices, parameters_of(base), strict=False):  # the base raises if they do not fit
        entries = state.get(index)
        if isinstance(entries, dict) and (rule_state := _rule_state(entries)):
            state[index] = {key: value for key, value in entries.items() if key not in rule_state}
            _add_to_memory(memory, parameter, rule_state)
    base_state = {index: entries for index, entries in state.items() if entries != {}}
    groups = [{key: value for key, value in group.items() if key not in _OF_GROUPS} for group in groups]
    return {**state_dict, "state": base_state, "param_groups": groups}, memory if is_memory else {}, step


def saved_radii(state_dict: dict[str, Any]) -> list[float | Tensor] | None:
    """Return the radii of a checkpoint that has them beside the base's entries; None if its groups hold them."""
    return None if _has_usual_form(state_dict) else state_dict.get(RHO)


def _has_usual_form(state_dict: Mapping[str, Any]) -> bool:
    """True if a checkpoint has the entries of ``torch.optim``."""
    return "state" in state_dict and "param_groups" in state_dict


def holds_sam_state(base: Optimizer) -> bool:
    """True if a checkpoint of SAM was loaded into the base itself."""
    return any(STEP in group for group in base.param_groups)


def take_from_base(base: Optimizer) -> tuple[Memory, int]:
    """Remove SAM's part from a base that has loaded it; return the rules' memory and the step counter."""
    step = max((group.pop(STEP, 0) for group in base.param_groups), default=0)
    before_steps = [group.pop(_MEMORY_BEFORE_STEPS, False) for group in base.param_groups]
    memory: Memory = {}
    for parameter in parameters_of(base):
        state = base.state.get(parameter) or {}
        if rule_state := _rule_state(state):
            for name in rule_state:
                del state[name]
            _add_to_memory(memory, parameter, rule_state)
            if not state:
                del base.state[parameter]
    return memory if step or any(before_steps) else {}, step


def _rule_state(state: dict[Any, Any]) -> dict[str, Any]:
    """Return the entries of rules in the state of a parameter."""
    return {k: v for k, v in state.items() if isinstance(k, str) and k.startswith(_MEMORY)}


def _add_to_memory(memory: Memory, parameter: Tensor, rule_state: dict[str, Any]) -> None:
    for name, value in rule_state.items():
        rule, key = name.removeprefix(_MEMORY).split(".", 1)
        memory.setdefault(rule, {}).setdefault(parameter, {})[key] = _to_tensor(value, parameter.device)


# torch.optim casts every tensor in a parameter's state to the parameter's dtype when it loads, but no numbers: a
# float64 scalar travels as a number, or a half-precision model would round it.


def _to_number(value: Tensor) -> Tensor | float:
    return float(value) if value.dim() == 0 and value.dtype == torch.float64 else value


def _to_tensor(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    return torch.tensor(value, dtype=torch.float64)
