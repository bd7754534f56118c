"""The methods that can be compared: how each builds its optimizer, and the cost of a step.

They are made from the cards of `steppe.methods`; no other module depends on the name of a method.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType, UnionType
from typing import Any, TypeVar, Union, Unpack, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.experiments.entry_points import check_name, load_entry_point
from steppe.experiments.errors import ExperimentError, unknown
from steppe.methods._card import Comparison, MethodCard, plain_base
from steppe.methods._options import Options
from steppe.methods._step_function import StepFunction
from steppe.methods.registry import CARDS

T = TypeVar("T")
Value = bool | int | float | str
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
"""Parameters, or groups of them, as the optimizers of torch take them."""


@dataclass(frozen=True)
class RunContext:
    """Values of a run for a method's parameters: rho, model, seed and total_steps, and others that are required."""

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


_FROM_CONTEXT = frozenset(f.name for f in fields(RunContext))
# filled even where they have a default
_ALWAYS = frozenset({"rho", "model", "seed", "replay_rng", "total_steps"})


@dataclass(frozen=True)
class Method(Comparison):
    """A method as a recipe can name it: how it is built and run, and its label in tables and figures."""

    build: Callable[..., Optimizer] = plain_base
    passes: Fraction | float | Callable[..., Fraction | float] = 2
    label: str = field(kw_only=True)
    plain: str | None = None
    """The name of the base optimizer that the method *is*; None if it wraps the recipe's base."""
    needs_adapters: bool = False
    """True if it acts on LoRA adapters of the model, so that it trains tasks that have them only."""

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of `build` and `step_function` after the optimizer."""
        return {**_parameters(self.build), **_parameters(self.step_function)}

    @property
    def arguments(self) -> Mapping[str, type[Value]]:
        """The arguments of a spec, rho first, and their types."""
        found = {
            name: kind
            for name, parameter in self.parameters.items()
            if (name == "rho" or not _is_filled(parameter)) and (kind := _kind(parameter))
        }
        return dict(sorted(found.items(), key=lambda item: item[0] != "rho"))

    @property
    def needs_classes(self) -> bool:
        """True if the run fills in the number of classes, which not every task has."""
        return self._is_filled_in("classes")

    @property
    def follows_plan(self) -> bool:
        """True if it follows a schedule over the planned steps, so that a part of its run is no result."""
        return self._is_filled_in("total_steps")

    def _is_filled_in(self, name: str) -> bool:
        parameter = self.parameters.get(name)
        return parameter is not None and _is_filled(parameter)

    def cost(self, overrides: Mapping[str, Value]) -> Fraction:
        """Return the planned gradient evaluations for a sample in a step, with the arguments of a spec."""
        cost = self.passes
        if callable(cost):
            values = {name: parameter.default for name, parameter in self.parameters.items()} | dict(overrides)
            cost = cost(**{name: values[name] for name in inspect.signature(cost).parameters})
        # the decimal or the third that was written, not the nearest binary number
        return Fraction(cost).limit_denominator(10_000)


def _parameters(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters after the optimizer; of the options of every method, those that a run always fills."""
    found: dict[str, inspect.Parameter] = {}
    for name, p in list(inspect.signature(function, eval_str=True).parameters.items())[1:]:
        if p.kind is p.VAR_KEYWORD and get_origin(p.annotation) is Unpack:  # as in `**options: Unpack[Options]`
            (options,) = get_args(p.annotation)
            passed_on = _ALWAYS & options.__annotations__.keys()
            found |= {each: p.replace(name=each, kind=p.KEYWORD_ONLY, annotation=object) for each in passed_on}
        elif name in _ALWAYS or name not in Options.__annotations__:
            found[name] = p
    return found


def _is_filled(parameter: inspect.Parameter) -> bool:
    """True if the run fills it, and not the spec."""
    required = parameter.default is parameter.empty
    return parameter.name in _ALWAYS or (required and parameter.name in _FROM_CONTEXT)


def fill(function: Callable[..., T], optimizer: Optimizer, context: RunContext, overrides: Mapping[str, Value]) -> T:
    """Call `function` with the optimizer, and with the values of the run and of the spec for its parameters."""
    parameters = _parameters(function)
    from_run = {name: getattr(context, name) for name, parameter in parameters.items() if _is_filled(parameter)}
    from_spec = {k: v for k, v in overrides.items() if k in parameters and k not in from_run}
    return function(optimizer, **from_run, **from_spec)


def _kind(parameter: inspect.Parameter) -> type[Value] | None:
    """Return the type of an argument that can be written in a spec, without annotation that of its default, or None."""
    annotation = type(parameter.default) if parameter.annotation is parameter.empty else parameter.annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in (bool, int, float, str) if kind in kinds), None)


@dataclass(frozen=True)
class Base:
    """A base optimizer: `build(parameters, lr, momentum, weight_decay, nesterov=False, on_gpu=False)`."""

    build: Callable[..., Optimizer]
    has_momentum: bool = False


_FUSED_ON_GPUS = ("SGD", "AdamW", "Adam")


def _torch(name: str) -> Base:
    """Return an optimizer of torch; it gets the options that it has."""
    kind = getattr(torch.optim, name)
    known = inspect.signature(kind).parameters

    def build(
        parameters: Parameters,
        lr: float,
        momentum: float,
        weight_decay: float,
        *,
        nesterov: bool = False,
        on_gpu: bool = False,
    ) -> Optimizer:
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        if on_gpu:
            options |= {"fused": name in _FUSED_ON_GPUS or None, "capturable": True}
        made: Optimizer = kind(parameters, **{key: value for key, value in options.items() if key in known})
        return made

    return Base(build, has_momentum="momentum" in known)


BASES: Mapping[str, Base] = MappingProxyType(
    {
        name.lower(): _torch(name)
        for name in (
            *("SGD", "AdamW", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Adafactor"),
        )
    }
)
"""The optimizers of torch by the names of their classes in lower case."""


def _of_card(card: MethodCard, how: Comparison) -> Method:
    own = {"build": how.build or card.function, "passes": how.passes or card.passes}
    return Method(**vars(how) | own, label=card.label, needs_adapters=card.needs_adapters)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "base": Method("the plain base optimizer, whichever it is", passes=1, label="base", capturable=True),
        "sgd": Method("plain SGD", passes=1, label="SGD", plain="sgd", capturable=True),
        "adamw": Method("plain AdamW", passes=1, label="AdamW", plain="adamw", capturable=True),
        **{name: _of_card(card, card.comparison) for name, card in CARDS.items() if card.comparison is not None},
    }
)

AVERAGES = ("ema", "swa")
"""The averages of the weights that a spec may name after a method, `sgd+ema`."""

_GROUP = "steppe.methods"
"""The entry points by which installed packages add methods."""


def find(name: str) -> Method:
    """Return a method by its name: of the registry, of an installed package's entry point, or package.module:function.

    Raises ValueError when there is none.
    """
    return METHODS[name] if name in METHODS else _from_outside(name)


@cache
def _from_outside(name: str) -> Method:
    """Load a method that is not in the registry; kept, because a run looks its method up often."""
    for entry_point in entry_points(group=_GROUP):
        if entry_point.name == name:
            return from_function(name, entry_point.load())
    if ":" not in name or name.partition(":")[0] in METHODS:
        raise ValueError(unknown("methods", name.partition(":")[0], METHODS))
    check_name("methods", name)
    try:
        return from_function(name, load_entry_point("methods", name))
    except ExperimentError as error:
        raise ValueError(str(error)) from error


def from_function(name: str, function: Callable[..., Optimizer]) -> Method:
    """Make a method of a function that builds an optimizer around a base: function(base, rho=0.05, model=..., ...).

    It is called with the base optimizer, and by name with what it has parameters for: rho, model, seed, total_steps,
    samples, classes, and the arguments of its spec. Its attribute `passes` is the planned cost of a step, 2 by default.
    What a step really costs is counted. The function of a method of the registry is that method.
    """
    if not callable(function):
        raise ValueError(
            f"methods: {name} is {type(function).__name__}, and a function of the base optimizer is needed"
        )
    for known, method in METHODS.items():
        if known in CARDS and CARDS[known].function is inspect.unwrap(function):
            return method
    summary = (inspect.getdoc(function) or "a method of your own").strip().splitlines()[0]
    passes = getattr(function, "passes", 2)
    step_function = getattr(function, "step_function", StepFunction)
    label = name.rpartition(":")[2].rpartition(".")[2]
    return Method(summary, function, passes, step_function, label=label)
