"""Rules and options of an optimizer: checks that each rule is in its slot, and fits the optimizer."""

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.groups import parameters_of
from steppe._engine.shared import Shared
from steppe.rules import Cadence, ParameterSubset, Perturbation, ScaledDirection, needs_gradient

_T = TypeVar("_T")

SLOTS = ("perturbation", "combination", "cadence")
"""The attributes of an optimizer that hold its rules."""
OPTIONS = ("model", "replay_rng", "per_rank", "stochastic_rounding")
"""The attributes of an optimizer that hold its options; each is an :class:`Option`."""


class Option(Shared[_T]):
    """An option of the constructor. One that is assigned later is checked as there, and takes effect."""

    def __set__(self, optimizer: Any, value: _T) -> None:
        if self.is_set(optimizer):
            value = optimizer.change_option(self._name, value)
        super().__set__(optimizer, value)


class Rule(Shared[_T]):
    """A rule of an optimizer. One that is assigned later is checked as the constructor checks its arguments."""

    def __set__(self, optimizer: Any, value: _T) -> None:
        if self.is_set(optimizer):
            if self._name in getattr(optimizer, "own_rules", ()):
                raise TypeError(
                    f"{type(optimizer).__name__} has a {self._name} of its own: make a steppe.SAM for another one"
                )
            rules = {slot: getattr(optimizer, slot) for slot in SLOTS} | {self._name: value}
            value = accepted_rules(optimizer, optimizer.base, per_rank=optimizer.per_rank, **rules)[self._name]
        super().__set__(optimizer, value)


def accepted_rules(optimizer: Any, base: Optimizer, *, per_rank: bool, **rules: Any) -> dict[str, Any]:
    """Return the rules in the form in which the optimizer uses them, by their slots.

    Raises:
        TypeError: A rule in the wrong slot.
        ValueError: A rule that does not fit the optimizer, its parameters, or the other rules.
    """
    check_slots(**rules)
    if per_rank:
        check_per_rank(rules["perturbation"], rules["cadence"])
    check_parameters(rules["perturbation"], list(parameters_of(base)))
    return {**rules, "perturbation": optimizer.accept_perturbation(rules["perturbation"])}


def check_slots(**rules: Any) -> None:
    """Refuse a rule that is no function, or one of another kind than its slot.

    Perturbations and cadences both take a point: in the wrong slot, one would be called, and perhaps without an error.
    A rule whose ``__call__`` has no annotations may be of any kind.

    Raises:
        TypeError: Names the rule and the remedy.
    """
    for slot, rule in rules.items():
        if isinstance(rule, type):
            raise TypeError(f"{slot}= needs a rule, got the class {rule.__name__}: write {slot}={rule.__name__}(...)")
        if not callable(rule):
            raise TypeError(f"{slot}= needs a rule, a function of a steppe.rules.Point, got {rule!r}")
        kind = _kind(rule)
        if kind is not None and kind != slot:
            raise TypeError(f"{slot}={rule!r} is a rule of another kind: write {kind}={rule!r}")
        if slot == "combination" and not hasattr(rule, "needs_unperturbed_gradient"):
            raise TypeError(
                f"combination={rule!r} has no attribute needs_unperturbed_gradient, so that it is unknown if g must be "
                "kept through the second pass: see steppe.rules.Combination"
            )


def check_parameters(perturbation: Perturbation, owned: Collection[Tensor]) -> None:
    """Refuse a perturbation, or a rule inside of it, that names parameters which the optimizer does not have.

    Raises:
        ValueError: Says how many.
    """
    rule: Any = perturbation
    while rule is not None:
        check: Callable[[Collection[Tensor]], None] | None = getattr(rule, "check_parameters", None)
        if check is not None:
            check(owned)
        rule = getattr(rule, "rule", None)


def with_parameters(perturbation: Perturbation, replaced: Mapping[Tensor, Tensor]) -> Perturbation:
    """Return the perturbation for parameters that were put in the place of others.

    Args:
        perturbation: The rule.
        replaced: The new parameters by those that they replace.

    Returns:
        The same rule, unless it or a rule inside of it names parameters that were replaced.
    """
    rule: Any = perturbation
    if (inner := getattr(rule, "rule", None)) is not None:
        changed = with_parameters(inner, replaced)
        if changed is not inner:
            rule = copy.copy(rule)
            object.__setattr__(rule, "rule", changed)  # rules are frozen dataclasses, or classes of the user's own
    follow: Callable[[Mapping[Tensor, Tensor]], Perturbation] | None = getattr(rule, "with_parameters", None)
    return cast(Perturbation, rule) if follow is None else follow(replaced)


def check_per_rank(perturbation: Perturbation, cadence: Cadence) -> None:
    """Refuse ``per_rank=True`` with rules that cannot differ between the ranks, or that must not.

    Raises:
        ValueError: Names the rule.
    """
    if not needs_gradient(perturbation):
        why = (
            f"{perturbation} does not use the gradient, so that all ranks are perturbed alike (GaussianNoise: give "
            "each rank a seed)"
        )
    elif needs_gradient(cadence):
        why = f"{cadence} decides by the gradient at w, which differs between the ranks: only some would perturb"
    else:
        return
    raise ValueError(f"per_rank=True: {why}. Leave per_rank out, or take other rules")


def check_subset(perturbation: Perturbation, owned: Iterable[Tensor]) -> str | None:
    """Refuse a subset of parameters that the optimizer no longer has; return a warning if all of them are frozen.

    Called at each step, because groups change. A part of the subset may be missing: groups are added one by one.

    Raises:
        ValueError: None of the parameters to perturb is in the optimizer.
    """
    rule: Any = perturbation
    while rule is not None:
        if isinstance(rule, ParameterSubset):
            chosen = set(rule.parameters)
            trained = [p.requires_grad for p in owned if p in chosen]
            if not trained:
                rule.check_parameters([])
            if not any(trained):
                return (
                    "all parameters to perturb (only=, ParameterSubset) are frozen, so that nothing is perturbed, at "
                    "the cost of a second pass. Unfreeze them, choose others, or perturb in a later phase only, with "
                    "cadence=steppe.LatePhase(...)"
                )
            return None
        rule = getattr(rule, "rule", None)
    return None


def _kind(rule: Callable[..., Any]) -> str | None:
    """Return the slot of a rule by its annotations; None if they do not tell."""
    try:
        signature = inspect.signature(rule)
    except (TypeError, ValueError):
        return None
    required = [p for p in signature.parameters.values() if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]
    if len(required) == 2:
        return "combination"
    returned = signature.return_annotation
    if returned in (ScaledDirection, "ScaledDirection"):
        return "perturbation"
    return "cadence" if returned in (bool, "bool") else None
