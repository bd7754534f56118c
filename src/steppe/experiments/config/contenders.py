"""The contenders of a comparison: a name -> how its optimizer is built, and what one of its steps costs.

An added method is one added entry of `CONTENDERS`; nothing else looks at a name.
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

from steppe import variants
from steppe.catalogue import CATALOGUE
from steppe.experiments.training.drivers import Driver
from steppe.experiments.training.method_drivers import AveragedWeights, MicroBatches, OnAFraction, OwnPast, Sharpest

__all__ = ["BASES", "CONTENDERS", "Base", "Contender", "Setting", "unknown"]

T = TypeVar("T")
Value = bool | int | float | str
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
"""Parameters, or groups of them, as the optimizers of torch take them."""


@dataclass(frozen=True)
class Setting:
    """What a run gives to a method: a required parameter of the same name, and rho, model and seed, are filled."""

    rho: float
    """The radius: the spec's own, or else `rho_factor` times the recipe's."""
    model: nn.Module
    steps: int
    """How many steps the method makes until equal compute is spent, as planned: for what follows a schedule."""
    images: int
    """How many training images there are."""
    classes: int
    seed: int
    replay_rng: bool = True
    """Whether the passes of a step draw the same random numbers, which no CUDA graph can do."""


_FROM_SETTING = frozenset(field.name for field in fields(Setting))
# also where they have a default; `steps=1` is a number of climbs
_ALWAYS = frozenset({"rho", "model", "seed", "replay_rng"})


@dataclass(frozen=True)
class Contender:
    """One method: `label` in tables and figures, one line of `summary`, and how it is made.

    `build` and `driver` take an optimizer first, the base and the built one. Their further parameters are filled by
    their names: from `Setting`, and the rest, with rho, are the arguments that a spec can give, else their defaults.
    """

    label: str
    summary: str
    build: Callable[..., Optimizer]
    """Make the optimizer around a base optimizer, as the functions of `steppe.variants` do; it may be the base."""
    passes: Fraction | float | Callable[..., Fraction | float] = 2
    """Planned gradient evaluations for an image in a step; a function takes arguments of the spec by name."""
    driver: Callable[..., Driver] = Driver
    rho_factor: float = 1.0
    """Turns the recipe's rho (SAM's) into the method's own, where the spec gives none: radii are not measured alike."""
    plain: str | None = None
    """The base optimizer that the contender *is*; None means that it wraps the recipe's base."""
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
            for function in (self.build, self.driver)
            for name, parameter in _parameters(function).items()
            if (name == "rho" or not _is_filled(parameter)) and (kind := _kind(parameter.annotation))
        }
        return dict(sorted(found.items(), key=lambda item: item[0] != "rho"))

    @property
    def follows_plan(self) -> bool:
        """Whether it follows a schedule over the planned steps, so that a part of its run says little."""
        filled = {**_parameters(self.build), **_parameters(self.driver)}
        return "steps" in filled and _is_filled(filled["steps"])

    def cost(self, given: Mapping[str, Value]) -> Fraction:
        """The planned gradient evaluations for an image in a step, with the arguments of a spec."""
        cost = self.passes
        if callable(cost):
            defaults = {k: p.default for f in (self.build, self.driver) for k, p in _parameters(f).items()}
            values = {**defaults, **given}
            cost = cost(**{name: values[name] for name in inspect.signature(cost).parameters})
        # a decimal or a third is meant, not the binary number next to it
        return Fraction(cost).limit_denominator(10_000)

    def optimizer(self, base: Optimizer, setting: Setting, given: Mapping[str, Value]) -> Optimizer:
        """Build the optimizer around `base`."""
        return _fill(self.build, setting, given, base)

    def steps_by(self, optimizer: Optimizer, setting: Setting, given: Mapping[str, Value]) -> Driver:
        """Make the driver of what `optimizer` built."""
        return _fill(self.driver, setting, given, optimizer)


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
    return parameter.name in _ALWAYS or (required and parameter.name in _FROM_SETTING)


def _fill(function: Callable[..., T], setting: Setting, given: Mapping[str, Value], optimizer: Optimizer) -> T:
    """Call `function` with what the run and the spec give for its parameters."""
    parameters = _parameters(function)
    from_run = {name: getattr(setting, name) for name, parameter in parameters.items() if _is_filled(parameter)}
    return function(optimizer, **from_run, **{k: v for k, v in given.items() if k in parameters and k not in from_run})


def _kind(annotation: Any) -> type[Value] | None:
    """The type of an argument that can be written in a spec; None when it cannot."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in (bool, int, float, str) if kind in kinds), None)


def _plain(base: Optimizer) -> Optimizer:
    return base


def _bsam(base: Optimizer, *, rho: float, model: nn.Module, images: int, seed: int, lr: float = 0.5) -> Optimizer:
    parameters = [p for group in base.param_groups for p in group["params"]]
    return variants.bsam(parameters, lr, rho, n_data=images, model=model, seed=seed)


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

_PAPERS = "the ratio of the usual values"
_GUESS = "a first guess, not measured"


def _named(name: str, summary: str, **own: Any) -> Contender:
    """A method of the catalogue, which knows its label, its function and what a step costs."""
    method = CATALOGUE[name]
    return Contender(method.label, summary, **{"build": method.source, "passes": method.passes, **own})


CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        "sgd": Contender("SGD", "plain SGD", _plain, passes=1, plain="sgd", capturable=True),
        "adamw": Contender("AdamW", "plain AdamW", _plain, passes=1, plain="adamw", capturable=True),
        "sam": _named("sam", "SAM around the base optimizer", capturable=True),
        "asam": _named(
            "asam", f"climbs in proportion to the weights, at 10 x rho ({_PAPERS})", rho_factor=10.0, capturable=True
        ),
        "msam": _named(
            "msam",
            f"climbs against the momentum, in one pass, at 4 x rho ({_GUESS})",
            rho_factor=4.0,
            needs_momentum=True,
            capturable=True,
        ),
        "rwp": _named("rwp", f"climbs at random, in one pass, at rho / 5 ({_PAPERS})", rho_factor=0.2),
        "mixed_rwp": _named(
            "mixed_rwp", f"mixes g with that of a random climb, at rho / 5 ({_PAPERS})", rho_factor=0.2
        ),
        "fisher_sam": _named(
            "fisher_sam", f"climbs in the Fisher metric, at 2 x rho ({_PAPERS})", rho_factor=2.0, capturable=True
        ),
        "layerwise_sam": _named(
            "layerwise_sam",
            f"climbs in each tensor by its own norm, at rho / 5 ({_PAPERS})",
            rho_factor=0.2,
            capturable=True,
        ),
        "sparse_sam": _named(
            "sparse_sam", f"climbs where the Fisher information is largest, at 2 x rho ({_PAPERS})", rho_factor=2.0
        ),
        "dynamic_sparse_sam": _named(
            "dynamic_sparse_sam",
            f"climbs with a mask that changes over the planned steps, at 2 x rho ({_PAPERS})",
            rho_factor=2.0,
        ),
        "esam": _named(
            "esam",
            "climbs with some weights, goes down with the samples that it raised most, at SAM's rho",
            driver=Sharpest,
        ),
        "friendly_sam": _named(
            "friendly_sam", "climbs along the batch's own part of the gradient, at SAM's rho", capturable=True
        ),
        "vasso": _named("vasso", "climbs along a running mean of the gradient, at SAM's rho", capturable=True),
        "zsharp": _named("zsharp", "climbs along the gradient's outstanding entries, at SAM's rho", capturable=True),
        "sam_on": _named(
            "sam_on",
            f"climbs with the normalisation layers only, at 2 x rho ({_GUESS})",
            rho_factor=2.0,
            capturable=True,
        ),
        "gsam": _named("gsam", "goes down the surrogate gap too, at SAM's rho", capturable=True),
        "wsam": _named("wsam", "goes down SAM's gradient and beyond, at SAM's rho", capturable=True),
        "pgn": _named("pgn", f"penalises the gradient's norm, at 2 x rho ({_PAPERS})", rho_factor=2.0, capturable=True),
        "looksam": _named(
            "looksam", "climbs at every k-th step and reuses that between, at SAM's rho", capturable=True
        ),
        "late_sam": _named(
            "late_sam",
            "plain steps first, SAM from a fraction `start` of the planned steps on, at SAM's rho",
            capturable=True,
        ),
        "random_sam": _named("random_sam", "climbs at each step with probability p, at SAM's rho", capturable=True),
        "aesam": _named(
            "aesam",
            "climbs where the gradient is unusually large, more often over the planned steps, at SAM's rho",
            passes=Fraction(3, 2),
        ),
        "lookbehind_sam": _named("lookbehind_sam", "k climbs and a step from each, at SAM's rho"),
        "sampa": _named("sampa", "two passes that need not wait for each other, at SAM's rho"),
        "bsam": _named(
            "bsam",
            f"SAM as Bayes: its own optimizer, at its own lr and at rho / 5 ({_PAPERS})",
            build=_bsam,
            rho_factor=0.2,
        ),
        "fraction_sam": _named(
            "climb_fraction",
            "SAM that climbs on a fraction of the batch, at SAM's rho",
            build=variants.sam,
            passes=lambda fraction, steps: 1 + steps * Fraction(fraction),
            driver=OnAFraction,
            capturable=True,
        ),
        "micro_sam": _named(
            "micro_batches",
            "SAM with a climb for every m images, at SAM's rho",
            build=variants.sam,
            passes=lambda steps: 1 + steps,
            driver=MicroBatches,
        ),
        "saf": _named("saf", "no climb: stays near the outputs of some epochs ago", build=_plain, driver=OwnPast),
        "mesa": _named(
            "mesa",
            "no climb: stays near the outputs of averaged weights (beta for short runs: a first guess, not measured)",
            build=_plain,
            driver=AveragedWeights,
        ),
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
