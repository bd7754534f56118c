"""Method specs: a method as it is written in a recipe, `sam`, `sam:rho=0.1`, `sgd+ema`, `package.module:function`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from torch import nn
from torch.optim import Optimizer

from steppe.experiments.config.methods import (
    AVERAGES,
    BASES,
    METHODS,
    Method,
    RunContext,
    Value,
    fill,
    find,
    from_function,
)
from steppe.experiments.errors import ExperimentError, place, typed, unknown
from steppe.methods._step_function import StepFunction
from steppe.sam import SAM

_SYNTAX = "write NAME or NAME:KEY=VALUE,KEY=VALUE, for example sam:rho=0.1"
# The name may be package.module:function, whose colon is followed by no "=" before the next colon or the end.
_SPEC = re.compile(r"(?P<name>[^:+]*(?::[^:+=]+(?=$|[:+]))?)(?:\+(?P<average>[^:]*))?(?::(?P<arguments>.*))?")
_BOOLEANS: Mapping[str, bool] = {"true": True, "false": False}


@dataclass(frozen=True)
class MethodSpec:
    """A method, the arguments that differ from its defaults, and the average of its weights that is evaluated."""

    name: str
    overrides: tuple[tuple[str, Value], ...] = ()
    average: str = ""
    """ema or swa, see `steppe.averaging.from_name`; empty for the weights themselves."""
    share: Fraction = Fraction(1)
    """The part of the compute that it gets; below 1 for a control that makes as many steps as a costlier method."""
    function: Callable[..., Optimizer] | None = field(default=None, compare=False, repr=False)
    """The method itself, if it has no name by which it could be imported."""

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Read a spec; two ways to write the same one give equal specs.

        Raises ValueError that names what is wrong.

        >>> str(MethodSpec.parse("late_sam:start=.50,rho=1e-1"))
        'late_sam:rho=0.1,start=0.5'
        """
        found = _SPEC.fullmatch(text)
        name, average, rest = found.group("name", "average", "arguments") if found else (text, None, None)
        if ":" in name and name.partition(":")[0] in METHODS:  # an argument without a value, and no function
            name, _, rest = name.partition(":")
        if average is not None and average not in AVERAGES:
            raise ValueError(unknown(f"methods: {text}: the average", average, AVERAGES))
        known = find(name).arguments
        overrides: dict[str, Value] = {}
        for part in [] if rest is None else rest.split(","):
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"methods: {text}: {part!r} is not an argument: {_SYNTAX}")
            if key not in known:
                raise ValueError(unknown(f"methods: arguments of {name}", key, known))
            if key in overrides:
                raise ValueError(f"methods: {text}: {key} is given twice: give it once")
            overrides[key] = _read(text, key, value, known[key])
        return cls(name, average=average or "").override(overrides)

    @classmethod
    def read(cls, text: str) -> MethodSpec:
        """Read a spec from a folder; a function that cannot be found here can be reported, but not trained."""
        try:
            return cls.parse(text)
        except ValueError:
            if not re.fullmatch(r"\w+", text):
                raise
            return cls(text, function=not_here)

    def override(self, values: Mapping[str, Value]) -> MethodSpec:
        """Return a spec with further overrides, in the order of the method's arguments."""
        merged = {**dict(self.overrides), **values}
        arguments = self.definition.arguments
        return replace(self, overrides=tuple((key, merged[key]) for key in arguments if key in merged))

    @property
    def definition(self) -> Method:
        """The method itself: of the registry, of an installed package, or a function of the user's own."""
        return find(self.name) if self.function is None else from_function(self.name, self.function)

    @property
    def label(self) -> str:
        """The name in tables and figures.

        >>> MethodSpec.parse("sam:rho=.1,ascent_steps=2").label
        'SAM (rho 0.1, ascent steps 2)'
        """
        overrides = ", ".join(f"{key.replace('_', ' ')} {_write(value)}" for key, value in self.overrides)
        label = self.definition.label + (f" + {self.average.upper()}" if self.average else "")
        label += f" at {self.share} of the compute" if self.share != 1 else ""
        return f"{label} ({overrides})" if overrides else label

    @property
    def averaged_name(self) -> str:
        """The method and its average, without arguments."""
        return self.name + (f"+{self.average}" if self.average else "")

    def options_but(self, left_out: str) -> str:
        """Return the overrides as a spec has them, without one of them.

        >>> MethodSpec.parse("looksam:rho=0.1,interval=2").options_but("rho")
        'interval=2'
        """
        return ",".join(f"{key}={_write(value)}" for key, value in self.overrides if key != left_out)

    @property
    def folder(self) -> str:
        """The spec's part of a folder's name.

        >>> MethodSpec.parse("late_sam:start=0.5,rho=.1").folder
        'late_sam-rho=0.1-start=0.5'
        """
        name = self.averaged_name.replace(":", "-")
        name += f"@{float(self.share):.3g}" if self.share != 1 else ""
        return "-".join([name, *(f"{key}={_write(value)}" for key, value in self.overrides)])

    @property
    def passes(self) -> Fraction:
        """The planned gradient evaluations for a sample in a step."""
        return self.definition.cost(dict(self.overrides))

    def rho(self, recipe_rho: float) -> float:
        """Return the method's radius, in absolute terms."""
        return float(dict(self.overrides).get("rho", self.definition.rho_factor * recipe_rho))

    def optimizer(self, base: Optimizer, context: RunContext) -> Optimizer:
        return fill(self.definition.build, base, context, dict(self.overrides))

    def step_function(self, optimizer: Optimizer, context: RunContext) -> StepFunction:
        return fill(self.definition.step_function, optimizer, context, dict(self.overrides))

    def check(self, base: str, recipe_rho: float) -> None:
        """Build it once around a tiny model: ValueError when a value is out of the method's range.

        The model has no adapters: of a method for these, the radius is checked, and the rest around the task's model.
        """
        if self.function is not_here:
            return
        model = nn.Sequential(nn.BatchNorm1d(1))  # draws no random numbers, and has norm layers for sam_on to perturb
        context = RunContext(self.rho(recipe_rho), model, total_steps=1, samples=1, classes=2, seed=0)
        try:
            # in the place of a task's own optimizer, which is not there yet
            base_optimizer = BASES.get(base, BASES["sgd"]).build(model.parameters(), 0.1, 0.0, 0.0)
            if self.definition.needs_adapters:
                SAM(base_optimizer, context.rho)
            else:
                optimizer = self.optimizer(base_optimizer, context)
                if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "param_groups"):
                    raise ValueError(
                        f"it returned {type(optimizer).__name__}, and an optimizer around the base is needed: return "
                        "one with step() and param_groups, as steppe.SAM(base, rho)"
                    )
                self.step_function(optimizer, context)
            if self.passes <= 0:
                raise ValueError(f"a step would cost {self.passes} passes, and the run would never end")
        except (ValueError, ArithmeticError) as error:
            raise ValueError(f"methods: {self}: {error}") from error
        except Exception as error:
            if self.name in METHODS and self.function is None:
                raise
            raise ValueError(f"methods: {self}: it raised {typed(error)}{place(error)}") from error

    def __str__(self) -> str:
        overrides = ",".join(f"{key}={_write(value)}" for key, value in self.overrides)
        name = self.averaged_name + (f"@{self.share}" if self.share != 1 else "")
        return f"{name}:{overrides}" if overrides else name


def not_here(base: Optimizer) -> Optimizer:
    """A method that was given as a function of Python, and not by a name."""
    raise ExperimentError("this method was a function of another Python session: give it again to train it")


def _read(text: str, key: str, value: str, kind: type[Value]) -> Value:
    """Convert the text of a value to its type."""
    try:
        read = _BOOLEANS[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        read = math.nan
    if (isinstance(read, float) and not math.isfinite(read)) or (kind is str and not re.fullmatch(r"[\w.+]+", value)):
        wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a plain word"}[kind]
        raise ValueError(f"methods: {text}: {key}={value!r}, which must be {wanted}")
    return read


def _write(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
