"""The methods that can be compared: how each builds its optimizer, and the cost of a step.

They are made from the cards of `steppe.methods`; no other module depends on the name of a method.
"""

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

T = TypeVar("T")
Value = bool | int | float | str
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
"""Parameters, or groups of them, as the optimizers of torch take them."""


@dataclass(frozen=True)
class RunContext:
    """Values of a run for a method's parameters: required ones of the same name are filled, and rho, model and seed."""

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
    """True if the passes of a step draw the same random numbers; a CUDA graph cannot do that."""


_FROM_CONTEXT = frozenset(field.name for field in fields(RunContext))
# filled even where they have a default
_ALWAYS = frozenset({"rho", "model", "seed", "replay_rng"})


@dataclass(frozen=True)
class Method:
    """One method: its label in tables and figures, one line of summary, and how it is built.

    `build` takes the base optimizer first, `step_function` the built one. Their further parameters are filled by name:
    from `RunContext`; the rest, and rho, are arguments of a spec, or else have their defaults.
    """

    label: str
    summary: str
    build: Callable[..., Optimizer]
    """Build the optimizer around a base optimizer, as the functions of `steppe.variants` do, or return the base."""
    passes: Fraction | float | Callable[..., Fraction | float] = 2
    """Planned gradient evaluations for an image in a step; a function takes arguments of the spec by name."""
    step_function: Callable[..., StepFunction] = StepFunction
    rho_factor: float = 1.0
    """Factor from the recipe's rho (SAM's) to the method's own, where the spec gives none."""
    plain: str | None = None
    """The name of the base optimizer that the method *is*; None if it wraps the recipe's base."""
    needs_momentum: bool = False
    """True if it perturbs along the base's momentum."""
    capturable: bool = False
    """True if one CUDA graph per kind of step can be replayed for all: nothing but the cadence is decided on the host,
    and no random numbers depend on the step's number."""

    @property
    def arguments(self) -> Mapping[str, type[Value]]:
        """The arguments of a spec, in order, and their types."""
        found = {
            name: kind
            for function in (self.build, self.step_function)
            for name, parameter in _parameters(function).items()
            if (name == "rho" or not _is_filled(parameter)) and (kind := _kind(parameter.annotation))
        }
        return dict(sorted(found.items(), key=lambda item: item[0] != "rho"))

    @property
    def follows_plan(self) -> bool:
        """True if it follows a schedule over the planned steps, so that a part of its run is no result."""
        filled = {**_parameters(self.build), **_parameters(self.step_function)}
        return "total_steps" in filled and _is_filled(filled["total_steps"])

    def cost(self, overrides: Mapping[str, Value]) -> Fraction:
        """Return the planned gradient evaluations for an image in a step, with the arguments of a spec."""
        cost = self.passes
        if callable(cost):
            defaults = {k: p.default for f in (self.build, self.step_function) for k, p in _parameters(f).items()}
            values = {**defaults, **overrides}
            cost = cost(**{name: values[name] for name in inspect.signature(cost).parameters})
        # the decimal or the third that was written, not the nearest binary number
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
    """Return the parameters after the optimizer; of `**options: Unpack[...]`, those that a run always fills."""
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
    """True if the run fills it, and not the spec."""
    required = parameter.default is parameter.empty
    return parameter.name in _ALWAYS or (required and parameter.name in _FROM_CONTEXT)


def _fill(function: Callable[..., T], context: RunContext, overrides: Mapping[str, Value], optimizer: Optimizer) -> T:
    """Call `function` with the values of the run and of the spec for its parameters."""
    parameters = _parameters(function)
    from_run = {name: getattr(context, name) for name, parameter in parameters.items() if _is_filled(parameter)}
    from_spec = {k: v for k, v in overrides.items() if k in parameters and k not in from_run}
    return function(optimizer, **from_run, **from_spec)


def _kind(annotation: Any) -> type[Value] | None:
    """Return the type of an argument that can be written in a spec; None if it cannot."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in (bool, int, float, str) if kind in kinds), None)


@dataclass(frozen=True)
class Base:
    """A base optimizer: `build(parameters, lr, momentum, weight_decay, on_gpu=False)`; True if it has a momentum."""

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
    """Make a method from its card."""
    how = card.comparison
    assert how is not None
    passes = how.passes if how.passes is not None else card.passes
    assert passes is not None  # a card without a number has one in its comparison
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
    """Return the message that `value` is unknown, with the closest known one.

    >>> unknown("methods", "samm", ["sgd", "sam"])
    "methods: 'samm' is unknown; did you mean 'sam'? Known: sgd, sam"
    """
    known = list(known)
    close = difflib.get_close_matches(value, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"{field}: {value!r} is unknown{meant} Known: {', '.join(known) or 'none'}"
