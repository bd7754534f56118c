"""Specs: a method as it is written in a recipe, `sam`, `sam:rho=0.1`, `late_sam:start=0.5,rho=0.1`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import nn
from torch.optim import Optimizer

from steppe.experiments.config import methods
from steppe.experiments.config.methods import BASES, Method, RunContext, Value, unknown
from steppe.methods._step_function import StepFunction

__all__ = ["MethodSpec", "parse"]

_WAY = "write NAME or NAME:KEY=VALUE,KEY=VALUE, for example sam:rho=0.1"
_WORDS: Mapping[str, bool] = {"true": True, "false": False}


@dataclass(frozen=True)
class MethodSpec:
    """A method with the arguments that are given for it; the others keep their defaults."""

    name: str
    given: tuple[tuple[str, Value], ...] = ()

    @property
    def method(self) -> Method:
        """The method's entry in the registry."""
        return methods.METHODS[self.name]

    @property
    def label(self) -> str:
        """What it is called in tables and figures.

        >>> parse("late_sam:start=0.5,rho=.1").label
        'Late SAM (rho 0.1, start 0.5)'
        """
        given = ", ".join(f"{key} {_write(value)}" for key, value in self.given)
        return f"{self.method.label} ({given})" if given else self.method.label

    @property
    def folder(self) -> str:
        """Its part of a folder's name.

        >>> parse("late_sam:start=0.5,rho=.1").folder
        'late_sam-rho=0.1-start=0.5'
        """
        return "-".join([self.name, *(f"{key}={_write(value)}" for key, value in self.given)])

    @property
    def passes(self) -> Fraction:
        """The planned gradient evaluations for an image in a step."""
        return self.method.cost(dict(self.given))

    def rho(self, recipe_rho: float) -> float:
        """The method's radius, in absolute terms."""
        return float(dict(self.given).get("rho", self.method.rho_factor * recipe_rho))

    def optimizer(self, base: Optimizer, setting: RunContext) -> Optimizer:
        """Build the method's optimizer."""
        return self.method.optimizer(base, setting, dict(self.given))

    def step_function(self, optimizer: Optimizer, setting: RunContext) -> StepFunction:
        """Make what takes its steps."""
        return self.method.steps_by(optimizer, setting, dict(self.given))

    def check(self, base: str, recipe_rho: float) -> None:
        """Build it once around nearly nothing: ValueError when a value is out of the method's range."""
        model = nn.Sequential(nn.BatchNorm1d(1))  # it draws no random numbers, and sam_on has something to climb with
        setting = RunContext(self.rho(recipe_rho), model, steps=1, images=1, classes=2, seed=0)
        try:
            self.step_function(self.optimizer(BASES[base].build(model.parameters(), 0.1, 0.0, 0.0), setting), setting)
            if self.passes <= 0:
                raise ValueError(f"a step would cost {self.passes} passes, and the run would never end")
        except (ValueError, ArithmeticError) as error:
            raise ValueError(f"methods: {self}: {error}") from error

    def __str__(self) -> str:
        given = ",".join(f"{key}={_write(value)}" for key, value in self.given)
        return f"{self.name}:{given}" if given else self.name


def parse(text: str) -> MethodSpec:
    """Read a spec; ValueError that names what is wrong. Two ways to write the same one give equal specs.

    >>> str(parse("late_sam:start=.50,rho=1e-1"))
    'late_sam:rho=0.1,start=0.5'
    """
    name, colon, rest = text.partition(":")
    if name not in methods.METHODS:
        raise ValueError(unknown("methods", name, methods.METHODS))
    known = methods.METHODS[name].arguments
    given: dict[str, Value] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"methods: {text}: {part!r} is not an argument: {_WAY}")
        if key not in known:
            raise ValueError(unknown(f"methods: arguments of {name}", key, known))
        if key in given:
            raise ValueError(f"methods: {text}: {key} is given twice, and only one of them can be meant")
        given[key] = _read(text, key, value, known[key])
    return MethodSpec(name, tuple((key, given[key]) for key in known if key in given))


def _read(text: str, key: str, value: str, kind: type[Value]) -> Value:
    """Turn the text of a value into its type."""
    try:
        read = _WORDS[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        read = math.nan
    if (isinstance(read, float) and not math.isfinite(read)) or (kind is str and not re.fullmatch(r"[\w.+]+", value)):
        wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a plain word"}[kind]
        raise ValueError(f"methods: {text}: {key}={value!r}, which must be {wanted}")
    return read


def _write(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
