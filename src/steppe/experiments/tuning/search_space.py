"""What `steppe tune` searches: words such as `rho=0.01..1`, `lr=0.02,0.05,0.1`, `p=0.1..0.9:linear`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, get_args, get_origin, get_type_hints

from steppe.experiments.config.method_spec import MethodSpec, parse
from steppe.experiments.config.methods import Value, unknown
from steppe.experiments.config.recipe import Recipe

__all__ = ["Dimension", "Listed", "Range", "Space", "Values", "grid", "read", "spaces"]

_WAY = "write NAME=LOW..HIGH, NAME=LOW..HIGH:linear, NAME=LOW..HIGH:log or NAME=VALUE,VALUE,..."

# Fields of a recipe that cannot be searched: the compute and what it is spent on would no longer be equal, or the
# value says what a run is called, where it lies, and how it is computed.
_FIXED = frozenset(
    {
        *("name", "dataset", "data_dir", "methods", "rho", "epochs", "extra_epochs", "seeds", "first_seed"),
        *("eval_every", "device", "amp", "channels_last", "compile", "threads", "checkpoint_seconds", "tensorboard"),
        *("out", "width", "stem_stride", "norm", "base", "label_noise", "flatness_every", "flatness_samples"),
        "cuda_graphs",
    }
)

Values = Mapping[str, Value]


@dataclass(frozen=True)
class Range:
    """All values from `low` to `high`, both included, drawn evenly in the value or, with `log`, in its logarithm."""

    name: str
    low: float
    high: float
    log: bool
    whole: bool = False

    def round(self, value: Value) -> Value:
        """To three digits: more than that is noise, and nobody wants to type it."""
        if self.whole:
            return int(value)
        return min(max(float(f"{float(value):.3g}"), self.low), self.high)

    def edge(self, value: Value) -> str | None:
        """At which edge a value lies, within a twentieth of the range; None when it lies inside."""
        place = math.log if self.log else float
        low, high = place(self.low), place(self.high)
        where = (place(float(value)) - low) / (high - low)
        return "lower" if where <= 0.05 else "upper" if where >= 0.95 else None

    def __str__(self) -> str:
        natural = self.log is not self.whole
        return f"{self.name}={self.low:g}..{self.high:g}" + ("" if natural else ":log" if self.log else ":linear")


@dataclass(frozen=True)
class Listed:
    """One of some values, in the order in which they were given."""

    name: str
    values: tuple[Value, ...]

    def round(self, value: Value) -> Value:
        """A listed value is meant as it is."""
        return value

    def edge(self, value: Value) -> str | None:
        """At which edge of the listed numbers a value lies; words have no edges, nor have two numbers an inside."""
        numbers = [v for v in self.values if not isinstance(v, bool | str)]
        if len(numbers) < max(3, len(self.values)):
            return None
        return "lower" if value == min(numbers) else "upper" if value == max(numbers) else None

    def __str__(self) -> str:
        return f"{self.name}={','.join(_write(value) for value in self.values)}"


Dimension = Range | Listed


@dataclass(frozen=True)
class Space:
    """A method and what is searched of it; nothing for one that is only trained as it is."""

    recipe: Recipe
    """The recipe with this method alone."""
    dimensions: tuple[Dimension, ...]

    @property
    def spec(self) -> MethodSpec:
        """The method, before anything is chosen."""
        return parse(self.recipe.methods[0])

    def at(self, values: Values) -> Recipe:
        """The recipe with the method at these values; ValueError when it cannot take them."""
        known = self.spec.method.arguments
        given = {**dict(self.spec.given), **{k: v for k, v in values.items() if k in known}}
        spec = MethodSpec(self.spec.name, tuple((key, given[key]) for key in known if key in given))
        rest: dict[str, Any] = {k: v for k, v in values.items() if k not in known}
        return replace(self.recipe, methods=(str(spec),), **rest)

    def usual(self) -> Values | None:
        """The values that the recipe has by itself, where all of them are searched; None where one of them is not."""
        known, given = self.spec.method.arguments, dict(self.spec.given)
        values: dict[str, Value] = {}
        for dimension in self.dimensions:
            name = dimension.name
            if name == "rho":
                values[name] = self.spec.rho(self.recipe.rho)
            elif name in given:
                values[name] = given[name]
            elif name not in known:
                values[name] = getattr(self.recipe, name)
            else:
                return None
            if isinstance(dimension, Range) and not dimension.low <= float(values[name]) <= dimension.high:
                return None
            if isinstance(dimension, Listed) and values[name] not in dimension.values:
                return None
        return values


def spaces(recipe: Recipe, words: Sequence[str], *, baseline: bool) -> list[Space]:
    """What is searched of each method of `recipe`, the baseline first; ValueError that says what is wrong.

    Without words it is rho, from a tenth of the method's usual value to ten times that.
    """
    # one base for all methods: a recipe whose methods are looked at one by one would give some of them momentum
    recipe = replace(recipe, momentum=recipe.base_momentum, extra_epochs=0)
    methods = list(recipe.methods)
    if baseline and not any(parse(method).method.plain for method in methods):
        methods.insert(0, recipe.base)
    found = [_space(replace(recipe, methods=(method,)), words, methods) for method in methods]
    for word in words:
        name = word.partition("=")[0]
        if not any(dimension.name == name for space in found for dimension in space.dimensions):
            _check(word, methods)
    if not any(space.dimensions for space in found):
        raise ValueError(
            f"search: none of {' '.join(methods)} has a rho, so there is nothing to tune: name methods with "
            "--methods, or what to search with --search"
        )
    for space in found:
        _try(space)
    return found


def grid(dimensions: Sequence[Dimension]) -> list[Values]:
    """Every combination of listed values; ValueError when a dimension is a range."""
    for dimension in dimensions:
        if isinstance(dimension, Range):
            raise ValueError(
                f"search: {dimension} is a range, and a grid needs its values: write {dimension.name}=VALUE,VALUE,..."
            )
    listed = [dimension for dimension in dimensions if isinstance(dimension, Listed)]
    return [dict(zip([d.name for d in listed], values, strict=True)) for values in product(*(d.values for d in listed))]


def read(word: str, kind: type[Value]) -> Dimension:
    """Read one word, whose values are of `kind`.

    >>> read("rho=0.01..1", float)
    Range(name='rho', low=0.01, high=1.0, log=True, whole=False)
    >>> read("k=2,4,8", int)
    Listed(name='k', values=(2, 4, 8))
    """
    name, equals, rest = word.partition("=")
    if not equals or not rest:
        raise ValueError(f"search: {word!r} says not what to try: {_WAY}")
    if ".." not in rest:
        values = tuple(_value(word, value, kind) for value in rest.split(","))
        if len(set(values)) < max(2, len(values)):
            raise ValueError(f"search: {word}: give two values or more, each of them once")
        return Listed(name, values)
    ends, colon, scale = rest.partition(":")
    if kind not in (int, float):
        raise ValueError(f"search: {word}: {name} is not a number, so it has no range: write {name}=VALUE,VALUE,...")
    if colon and scale not in ("log", "linear"):
        raise ValueError(f"search: {word}: {scale!r} is no scale, log and linear are")
    low, high = (_value(word, end, kind) for end in ends.split("..", 1))
    if not float(low) < float(high):
        raise ValueError(f"search: {word}: the range is empty, its low end must be below its high one")
    # what is a positive real number here is a scale (rho, lr), and its order of magnitude is the question
    log = scale == "log" or (not colon and kind is float)
    if log and float(low) <= 0:
        raise ValueError(
            f"search: {word}: a logarithmic range cannot begin at {low}: begin above 0, or say {name}={ends}:linear"
        )
    return Range(name, float(low), float(high), log, whole=kind is int)


def _space(recipe: Recipe, words: Sequence[str], methods: Sequence[str]) -> Space:
    known = parse(recipe.methods[0]).method.arguments
    if not words:
        return Space(recipe, _usual_range(recipe) if "rho" in known else ())
    dimensions: list[Dimension] = []
    for word in words:
        name = word.partition("=")[0]
        kind = known.get(name) or _fields().get(name)
        if kind is not None:
            dimensions.append(read(word, kind))
    names = [dimension.name for dimension in dimensions]
    if len(set(names)) < len(names):
        raise ValueError(f"search: {' '.join(words)}: name each thing once")
    return Space(recipe, tuple(dimensions))


def _usual_range(recipe: Recipe) -> tuple[Dimension, ...]:
    usual = parse(recipe.methods[0]).rho(recipe.rho)
    if not usual:
        raise ValueError("search: rho=0 has no tenth and no tenfold to search between: say --search rho=LOW..HIGH")
    low, high = (float(f"{factor * usual:.3g}") for factor in (0.1, 10.0))
    return (Range("rho", low, high, log=True),)


def _check(word: str, methods: Sequence[str]) -> None:
    """Say why nothing can be searched under this name."""
    name, equals, _ = word.partition("=")
    arguments = {key for method in methods for key in parse(method).method.arguments}
    if not equals:
        raise ValueError(f"search: {word!r} says not what to try: {_WAY}")
    if name in {field.name for field in fields(Recipe)} - {"rho"} and name not in _fields():
        raise ValueError(
            f"search: {name} is the same for all trials: with it the compute, the measurement or the machine would "
            "differ from trial to trial, and not only how well they train"
        )
    raise ValueError(unknown("search", name, sorted({*arguments, *_fields()})))


def _try(space: Space) -> None:
    """Make the recipes at both ends, so that a value out of a method's range is told before anything is trained."""
    lists = [(d.low, d.high) if isinstance(d, Range) else d.values for d in space.dimensions]
    for dimension, values in zip(space.dimensions, lists, strict=True):
        for value in values:
            whole = isinstance(dimension, Range) and dimension.whole
            try:
                space.at({dimension.name: int(value) if whole else value})
            except ValueError as error:
                raise ValueError(f"search: {dimension}: {error}") from error


def _fields() -> dict[str, type[Value]]:
    """The fields of a recipe that can be searched, and the types of their values."""
    return dict(_kinds())


def _kinds() -> Iterator[tuple[str, type[Value]]]:
    for name, annotation in get_type_hints(Recipe).items():
        if name in _FIXED:
            continue
        words = get_args(annotation)
        kinds = {type(word) for word in words} if get_origin(annotation) is not None else {annotation}
        kinds |= {word for word in words if isinstance(word, type)}
        kind = next((kind for kind in (bool, int, float, str) if kind in kinds), None)
        if kind is not None:
            yield name, kind


def _value(word: str, text: str, kind: type[Value]) -> Value:
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = math.nan
    if (isinstance(value, float) and not math.isfinite(value)) or value == "":
        wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a word"}[kind]
        raise ValueError(f"search: {word}: {text!r} must be {wanted}: {_WAY}")
    return value


def _write(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
