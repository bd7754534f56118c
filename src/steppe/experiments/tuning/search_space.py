"""The search space of `steppe tune`, from words such as `rho=0.01..1`, `lr=0.02,0.05,0.1`, `p=0.1..0.9:linear`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import METHODS, Value
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import unknown

_SYNTAX = "write NAME=LOW..HIGH, NAME=LOW..HIGH:linear, NAME=LOW..HIGH:log or NAME=VALUE,VALUE,..."

# The options of a recipe that can be searched. Others would change the compute, what it is spent on, or how a run is
# named, stored and computed.
_OPTIONS: Mapping[str, type[Value]] = MappingProxyType(
    dict.fromkeys(("lr", "head_lr", "momentum", "weight_decay"), float)
    | dict.fromkeys(("batch_size", "shots", "pretrain_epochs", "image_size"), int)
    | {"backbone": str, "pretrain_on": str, "freeze": bool}
)

Values = Mapping[str, Value]


# Not Optuna's distributions: `steppe plot` reads a search space where Optuna may be missing.
@dataclass(frozen=True)
class Range:
    """All values from `low` to `high`, both included, uniform in the value or, with `log`, in its logarithm."""

    name: str
    low: float
    high: float
    log: bool
    integer: bool = False

    @property
    def values(self) -> tuple[Value, ...]:
        """The two ends."""
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)

    def round(self, value: Value) -> Value:
        """Round to three digits: more are noise, and long to type."""
        if self.integer:
            return int(value)
        return min(max(float(f"{float(value):.3g}"), self.low), self.high)

    def contains(self, value: Value) -> bool:
        return self.low <= float(value) <= self.high

    def edge(self, value: Value) -> str | None:
        """Return the edge at which a value lies, within a twentieth of the range; None if it lies inside."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        position = (scale(float(value)) - low) / (high - low)
        return "lower" if position <= 0.05 else "upper" if position >= 0.95 else None

    def beyond(self, edge: str) -> "Range":
        """Return a logarithmic range of the same size around one of its edges.

        >>> print(Range("lr", 0.05, 0.2, log=True).beyond("upper"))
        lr=0.1..0.4
        """
        center, ratio = self.high if edge == "upper" else self.low, math.sqrt(self.high / self.low)
        low, high = center / ratio, center * ratio
        if self.integer:
            low, high = max(1, round(low)), math.ceil(high)
        return replace(self, low=float(f"{low:.3g}"), high=float(f"{high:.3g}"))

    def __str__(self) -> str:
        usual = self.log is not self.integer
        return f"{self.name}={self.low:g}..{self.high:g}" + ("" if usual else ":log" if self.log else ":linear")


@dataclass(frozen=True)
class Choices:
    """One of several values, in the order in which they were given."""

    name: str
    values: tuple[Value, ...]

    def contains(self, value: Value) -> bool:
        return value in self.values

    def edge(self, value: Value) -> str | None:
        """Return the edge of the numbers at which a value lies; None for words, and for fewer than three numbers."""
        numbers = [v for v in self.values if not isinstance(v, bool | str)]
        if len(numbers) < max(3, len(self.values)):
            return None
        return "lower" if value == min(numbers) else "upper" if value == max(numbers) else None

    def __str__(self) -> str:
        return f"{self.name}={','.join(_write(value) for value in self.values)}"


Dimension = Range | Choices


@dataclass(frozen=True)
class Space:
    """A method and its searched dimensions; none if it is trained once, as it is."""

    recipe: Recipe
    """The recipe with this method alone."""
    dimensions: tuple[Dimension, ...]

    @property
    def spec(self) -> MethodSpec:
        return self.recipe.comparison.methods[0]

    def at(self, values: Values) -> Recipe:
        """Return the recipe with the method at these values; ValueError when it cannot take them."""
        options = self.options(values)
        spec = self.spec.override({name: value for name, value in values.items() if name not in options})
        return self.recipe.replace(methods=(spec,), **options)

    def takes(self, values: Values) -> bool:
        """True if the method can take these values."""
        try:
            self.at(values)
        except ValueError:
            return False
        return True

    def options(self, values: Values) -> dict[str, Any]:
        """Return the values of options of the recipe; the others are arguments of the method."""
        arguments = self.spec.definition.arguments
        return {name: value for name, value in values.items() if name not in arguments}

    def usual(self, own: Values = MappingProxyType({})) -> Values | None:
        """Return the recipe's own values, if all of them lie within what is searched; else None.

        `own` are those of the task's optimizer, where the recipe leaves them open.
        """
        options = self.options({**own, **{k: v for k, v in self.recipe.options().items() if v is not None}})
        known = {**options, **dict(self.spec.overrides), "rho": self.spec.rho(self.recipe.training.rho)}
        values = {d.name: known[d.name] for d in self.dimensions if d.name in known and d.contains(known[d.name])}
        return values if len(values) == len(self.dimensions) else None

    def rounded(self, values: Values) -> Values:
        """Round the values of the searched dimensions; a trial that has just begun has none yet."""
        searched = {d: values[d.name] for d in self.dimensions if d.name in values}
        return {d.name: d.round(value) if isinstance(d, Range) else value for d, value in searched.items()}


def spaces(recipe: Recipe, words: Sequence[str], *, baseline: bool) -> list[Space]:
    """Return the search space of each method of `recipe`, the baseline first.

    Without words, rho is searched, from a tenth of the method's usual value to ten times that. A ValueError has the
    word that is wrong.
    """
    recipe = recipe.replace(extra_epochs=0)
    base = recipe.training.base
    if base != "own":
        # set for all methods together, because a recipe of one method chooses the momentum that this method needs
        recipe = recipe.replace(momentum=recipe.base_momentum)
    methods = list(recipe.comparison.methods)
    if baseline and not any(method.definition.plain or method.name == "base" for method in methods):
        methods.insert(0, MethodSpec(base if base in METHODS else "base"))
    found = [_space(recipe.replace(methods=(method,)), words) for method in methods]
    for word in words:
        name = word.partition("=")[0]
        if any(dimension.name == name for space in found for dimension in space.dimensions):
            continue
        if name in recipe.options().keys() - {"rho"} - _OPTIONS.keys():
            raise ValueError(
                f"search: {name} is the same for all trials: with it the compute, the measurement or the machine would "
                "differ from trial to trial, and not only how well they train"
            )
        arguments = {key for method in methods for key in method.definition.arguments}
        raise ValueError(unknown("search", name, sorted({*arguments, *_OPTIONS})))
    if not any(space.dimensions for space in found):
        raise ValueError(
            f"search: none of {' '.join(map(str, methods))} has a rho, so there is nothing to tune: name methods with "
            "--methods, or what to search with --search"
        )
    for space in found:
        for dimension in space.dimensions:
            for value in dimension.values:  # an error in a value is found before anything is trained
                try:
                    space.at({dimension.name: value})
                except ValueError as error:
                    raise ValueError(f"search: {dimension}: {error}") from error
    return found


def grid(dimensions: Sequence[Dimension]) -> list[Values]:
    """Return every combination of values; ValueError when a dimension is a range."""
    for dimension in dimensions:
        if isinstance(dimension, Range):
            raise ValueError(
                f"search: {dimension} is a range, and a grid needs its values: write {dimension.name}=VALUE,VALUE,..."
            )
    names = [dimension.name for dimension in dimensions]
    return [dict(zip(names, values, strict=True)) for values in product(*(d.values for d in dimensions))]


def read(word: str, kind: type[Value]) -> Dimension:
    """Parse one word, whose values have the type `kind`.

    >>> read("rho=0.01..1", float)
    Range(name='rho', low=0.01, high=1.0, log=True, integer=False)
    >>> read("k=2,4,8", int)
    Choices(name='k', values=(2, 4, 8))
    """
    name, equals, rest = word.partition("=")
    if not equals or not rest:
        raise ValueError(f"search: {word!r} names no values to try: {_SYNTAX}")
    if ".." not in rest:
        values = tuple(_value(word, value, kind) for value in rest.split(","))
        if len(set(values)) < max(2, len(values)):
            raise ValueError(f"search: {word}: give two or more different values")
        return Choices(name, values)
    ends, colon, scale = rest.partition(":")
    if kind not in (int, float):
        raise ValueError(f"search: {word}: {name} is not a number, so it has no range: write {name}=VALUE,VALUE,...")
    if colon and scale not in ("log", "linear"):
        raise ValueError(f"search: {word}: {scale!r} is no scale; use log or linear")
    low, high = (_value(word, end, kind) for end in ends.split("..", 1))
    if not float(low) < float(high):
        raise ValueError(f"search: {word}: the range is empty, its low end must be below its high one")
    # real numbers here are scales (rho, lr), whose order of magnitude is searched
    log = scale == "log" or (not colon and kind is float)
    if log and float(low) <= 0:
        raise ValueError(
            f"search: {word}: a logarithmic range cannot begin at {low}: begin above 0, or write {name}={ends}:linear"
        )
    return Range(name, float(low), float(high), log, integer=kind is int)


def _space(recipe: Recipe, words: Sequence[str]) -> Space:
    method = recipe.comparison.methods[0]
    known = method.definition.arguments
    if not words and "rho" in known:
        usual = method.rho(recipe.training.rho)
        if not usual:
            raise ValueError(
                "search: rho=0 has no default range, a tenth of it to ten times it: give one, --search rho=LOW..HIGH"
            )
        words = [f"rho={0.1 * usual:.3g}..{10 * usual:.3g}"]
    kinds = [known.get(name) or _OPTIONS.get(name) for name in (word.partition("=")[0] for word in words)]
    dimensions = tuple(read(word, kind) for word, kind in zip(words, kinds, strict=True) if kind is not None)
    if len({dimension.name for dimension in dimensions}) < len(dimensions):
        raise ValueError(f"search: {' '.join(words)}: give each name once")
    return Space(recipe, dimensions)


def _value(word: str, text: str, kind: type[Value]) -> Value:
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = math.nan
    if (isinstance(value, float) and not math.isfinite(value)) or value == "":
        wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a word"}[kind]
        raise ValueError(f"search: {word}: {text!r} must be {wanted}: {_SYNTAX}")
    return value


def _write(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
