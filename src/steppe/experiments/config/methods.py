"""The methods of a comparison: a name -> how its optimizer is built, and what one of its steps costs.

An added method is one added entry of `METHODS`; nothing else looks at a name.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from types import MappingProxyType, UnionType
from typing import Any, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.methods._card import MethodCard, plain_base
from steppe.methods._step_function import StepFunction
from steppe.methods.registry import CARDS

__all__ = ["BASES", "METHODS", "Base", "Method", "RunContext", "unknown"]

T = TypeVar("T")
Value = bool | int | float | str
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
"""Parameters, or groups of them, as the optimizers of torch take them."""


@dataclass(frozen=True)
class RunContext:
    """What a run gives to a method: a required parameter of the same name, and rho, model and seed, are filled."""

    rho: float
    """The radius: the spec's own, or else `rho_factor` times the recipe's."""
    model: nn.Module
    total_steps: int
    """The planned number of optimizer steps until equal compute is spent; the length of schedules."""
    samples: int
    """The number of training samples."""
    classes: int
    seed: int
    replay_rng: bool = True
    """Whether the passes of a step draw the same random numbers, which no CUDA graph can do."""


_FROM_CONTEXT = frozenset(field.name for field in fields(RunContext))
# filled even where they have a default
_ALWAYS = frozenset({"rho", "model", "seed", "replay_rng"})


@dataclass(frozen=True)
class Method:
    """One method: `label` in tables and figures, one line of `summary`, and how it is made.

    `build` and `step_function` take an optimizer first, the base and the built one. Their further parameters are filled by
    their names: from `RunContext`, and the rest, with rho, are the arguments that a spec can give, else their defaults.
    """

    label: str
    summary: str
    build: Callable[..., Optimizer]
    """Make the optimizer around a base optimizer, as the functions of `steppe.variants` do; it may be the base."""
    passes: Fraction | float | Callable[..., Fraction | float] = 2
    """Planned gradient evaluations for an image in a step; a function takes arguments of the spec by name."""
    step_function: Callable[..., StepFunction] = StepFunction
    rho_factor: float = 1.0
    """Turns the recipe's rho (SAM's) into the method's own, where the spec gives none: radii are not measured alike."""
    plain: str | None = None
    """The base optimizer that the method *is*; None means that it wraps the recipe's base."""
    needs_momentum: bool = False
    """Whether it climbs along the base's momentum."""
    capturable: bool = False
    """Whether the device does the same at every step that climbs, and at every other one, so that a CUDA graph of each
    stands for all: nothing but the climb is decided on the host, and nothing is drawn by the step's number."""

    @property
    def arguments(self) -> Mapping[str, type[Value]]:
        """What a spec can give: the names, in order, and their types."""
        found = {
            name: kind
            for function in (self.build, self.step_function)
            for name, parameter in _parameters(function).items()
            if (name == "rho" or not _is_filled(parameter)) and (kind := _kind(parameter.annotation))
        }
        return dict(sorted(found.items(), key=lambda item: item[0] != "rho"))

    @property
    def follows_plan(self) -> bool:
        """Whether it follows a schedule over the planned steps, so that a part of its run says little."""
        filled = {**_parameters(self.build), **_parameters(self.step_function)}
        return "total_steps" in filled and _is_filled(filled["total_steps"])

    def cost(self, given: Mapping[str, Value]) -> Fraction:
        """The planned gradient evaluations for an image in a step, with the arguments of a spec."""
        cost = self.passes
        if callable(cost):
            defaults = {k: p.default for f in (self.build, self.step_function) for k, p in _parameters(f).items()}
            values = {**defaults, **given}
            cost = cost(**{name: values[name] for name in inspect.signature(cost).parameters})
        # a decimal or a third is meant, not the binary number next to it
        return Fraction(cost).limit_denominator(10_000)

    def optimizer(self, base: Optimizer, context: RunContext, overrides: Mapping[str, Value]) -> Optimizer:
        """Build the optimizer around `base`."""
        return _fill(self.build, context, overrides, base)

    def make_step_function(
        self, optimizer: Optimizer, context: RunContext, overrides: Mapping[str, Value]
    ) -> StepFunction:
        """Build the step function of an optimizer that `optimizer` built."""
        return _fill(self.step_function, context, overrides, optimizer)


def _parameters(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """The parameters after the first, which is the optimizer; of `**options: Unpack[...]`, what a run always gives."""
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in list(inspect.signature(function, eval_str=True).parameters.items())[1:]:
        if parameter.kind is not parameter.VAR_KEYWORD:
            found[name] = parameter
        elif get_origin(parameter.annotation) is Unpack:
            (options,) = get_args(parameter.annotation)
            kinds = get_type_hints(options).items()
            found |= {k: inspect.Parameter(k, parameter.KEYWORD_ONLY, annotation=v) for k, v in kinds if k in _ALWAYS}
    return found


def _is_filled(parameter: inspect.Parameter) -> bool:
    """Whether the run gives it, and not the spec."""
    required = parameter.default is parameter.empty
    return parameter.name in _ALWAYS or (required and parameter.name in _FROM_CONTEXT)


def _fill(function: Callable[..., T], context: RunContext, overrides: Mapping[str, Value], optimizer: Optimizer) -> T:
    """Call `function` with the values of the run and of the spec for its parameters."""
    parameters = _parameters(function)
    from_run = {name: getattr(context, name) for name, parameter in parameters.items() if _is_filled(parameter)}
    from_spec = {k: v for k, v in overrides.items() if k in parameters and k not in from_run}
    return function(optimizer, **from_run, **from_spec)


def _kind(annotation: Any) -> type[Value] | None:
    """The type of an argument that can be written in a spec; None when it cannot."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in (bool, int, float, str) if kind in kinds), None)


@dataclass(frozen=True)
class Base:
    """A base optimizer: `build(parameters, lr, momentum, weight_decay, on_gpu=False)`, and whether momentum is its."""

    build: Callable[..., Optimizer]
    has_momentum: bool


def _sgd(parameters: Parameters, lr: float, momentum: float, weight_decay: float, *, on_gpu: bool = False) -> Optimizer:
    fused = on_gpu or None
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)


def _adamw(
    parameters: Parameters, lr: float, momentum: float, weight_decay: float, *, on_gpu: bool = False
) -> Optimizer:
    fused = on_gpu or None
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused, capturable=on_gpu)


BASES: Mapping[str, Base] = MappingProxyType(
    {"sgd": Base(_sgd, has_momentum=True), "adamw": Base(_adamw, has_momentum=False)}
)


def _of_card(card: MethodCard) -> Method:
    """Make the entry of a method from its card."""
    how = card.comparison
    assert how is not None
    passes = how.passes if how.passes is not None else card.passes
    assert passes is not None  # where the gradients decide, the comparison plans with a number
    return Method(
        card.label,
        how.summary,
        how.build or card.function,
        passes=passes,
        step_function=how.step_function,
        rho_factor=how.rho_factor,
        needs_momentum=how.needs_momentum,
        capturable=how.capturable,
    )


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "sgd": Method("SGD", "plain SGD", plain_base, passes=1, plain="sgd", capturable=True),
        "adamw": Method("AdamW", "plain AdamW", plain_base, passes=1, plain="adamw", capturable=True),
        **{name: _of_card(card) for name, card in CARDS.items() if card.comparison is not None},
    }
)


def unknown(field: str, value: str, known: Iterable[str]) -> str:
    """Say that `value` is not a known one, and which one was probably meant.

    >>> unknown("methods", "samm", ["sgd", "sam"])
    "methods: 'samm' is unknown; did you mean 'sam'? Known: sgd, sam"
    """
    known = list(known)
    close = difflib.get_close_matches(value, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"{field}: {value!r} is unknown{meant} Known: {', '.join(known) or 'none'}"
