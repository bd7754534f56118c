"""The card of a method: what a reader must know before taking it, and how `steppe compare` runs it."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from steppe.methods._step_function import StepFunction
from steppe.papers import Paper, citation, papers_of

Make = Callable[..., tuple[Any, ...]]

COPY = "a copy of the weights, allocated once"
COPY_AND_G = f"{COPY}; g until the second pass is done"
LENGTH = "the length of the training, in steps"
NO_CODE = "No code of the authors was found to compare with."
USUAL_RATIO = "the ratio of the usual values"
FIRST_GUESS = "a first guess, not measured"


@dataclass(frozen=True)
class Comparison:
    """How `steppe compare` builds and runs a method.

    `build` and `step_function` take an optimizer first, the base and the built one. Their further parameters are filled
    by name: from the run context, and the rest, with rho, from the method spec, else from their defaults.
    """

    summary: str
    """One line for `steppe compare --help`."""
    build: Callable[..., Optimizer] | None = None
    """Build the optimizer around a base optimizer; by default the card's function."""
    passes: Fraction | float | Callable[..., Fraction | float] | None = None
    """Planned gradient evaluations per sample and step; a function takes arguments of the spec by name. By default the
    card's."""
    step_function: Callable[..., StepFunction] = StepFunction
    rho_factor: float = 1.0
    """Factor from the recipe's rho (SAM's) to the method's own, where the spec gives none."""
    needs_momentum: bool = False
    """True if it perturbs along the base's momentum."""
    capturable: bool = False
    """True if one CUDA graph per kind of step stands for all: nothing but the cadence is decided on the host, and no
    random numbers depend on the step's number."""


def plain_base(base: Optimizer) -> Optimizer:
    """Return the base optimizer itself, for methods that act in the loss."""
    return base


@dataclass(frozen=True)
class MethodCard:
    """What a card says of a method, beside what the code and the measurements say."""

    name: str
    """The name of the method, and of its file."""
    function: Callable[..., Any]
    """The function that builds it; exported by :mod:`steppe.variants` if it bears the method's name."""
    label: str
    """What tables and figures call it."""
    about: str
    """The second sentence of the summary; the first is the docstring's."""
    equation: str
    cost: str
    """Passes a step, forward and backward over the batch, in words."""
    passes: Callable[..., float] | float | None
    """The same as a number; a function takes arguments of the method by name; None where the gradients decide."""
    memory: str
    """What is kept beside the base."""
    when: str
    when_not: str
    usual: Mapping[str, str]
    """Each hyperparameter and the paper's usual values."""
    checked: str
    """What ours was held against; where we differ and why."""
    caveats: Sequence[str]
    required: Mapping[str, Any] = field(default_factory=dict)
    """Arguments without a default, as an example has them."""
    make: Make | None = None
    """(base, model, **required) -> the optimizer, and what else takes part, where that is not ``part(base, ...)``."""
    arguments_of: tuple[Callable[..., Any], ...] = ()
    """What has its hyperparameters as arguments, where that is not ``part`` alone."""
    comparison: Comparison | None = None
    """How `steppe compare` runs it; None for a method that is an argument of another one."""
    use: str = ""
    """Lines that use it, where it takes more than ``optimizer.step(closure)``."""

    @property
    def summary(self) -> str:
        """What it does, in two sentences."""
        line = " ".join((inspect.getdoc(self.function) or "").partition("\n\n")[0].split()).replace("``", "`")
        first = re.split(r"\.(?: |$)|: e", line.removeprefix(f"{self.label}: "))[0]
        return f"{first[0].upper()}{first[1:]}. {self.about}"

    @property
    def usage(self) -> str:
        """Lines of code that use it, around a ``base`` and a ``model``."""
        if self.use:
            return self.use
        given = "".join(f", {name}={_code(value)}" for name, value in self.required.items())
        return f"optimizer = steppe.variants.{self.name}(base{given}, model=model)"

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The defaults of its arguments; those without one are missing."""
        parts = self.arguments_of or (self.function,)
        parameters = [p for part in parts for p in inspect.signature(part).parameters.values()]
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def cost_with(self, **given: Any) -> float | None:
        """The planned passes a step, with arguments of the method; None where the gradients decide.

        >>> CARDS["looksam"].cost_with(k=2)
        1.5
        """
        if not callable(self.passes):
            return self.passes
        values = {**self.defaults, **self.required, **given}
        return self.passes(**{name: values[name] for name in inspect.signature(self.passes).parameters})

    def example(self, base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
        """Return an optimizer that uses it, and what else of Steppe takes part.

        >>> model = nn.Linear(2, 2)
        >>> CARDS["gsam"].example(torch.optim.SGD(model.parameters(), lr=0.1), model)[0].combination
        SurrogateGap(alpha=0.2)
        """
        arguments = {**self.required, **given}
        if self.make is not None:
            return self.make(base, model, **arguments)
        return (self.function(base, **arguments, model=model),)

    @property
    def papers(self) -> tuple[Paper, ...]:
        """What to cite; SAM's own paper first, where it is used."""
        return tuple(dict.fromkeys(paper for part in self._small() for paper in papers_of(part)))

    @property
    def paper(self) -> Paper:
        """The method's own paper: the one that its docstring names last."""
        text = inspect.getdoc(self.function) or ""
        return [paper for paper in self.papers if paper.arxiv in text][-1]

    def bibtex(self) -> str:
        """The BibTeX of what it uses.

        >>> CARDS["gsam"].bibtex().count("@")
        2
        """
        return citation(*self._small())

    def _small(self) -> tuple[Any, ...]:
        model = nn.Sequential(nn.LayerNorm(1))
        return self.example(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def covers(self, spec: str) -> bool:
        """Whether a contender of `steppe compare` is measured for this card.

        >>> CARDS["ascent_steps"].covers("sam:steps=2"), CARDS["sam"].covers("sam:steps=2")
        (True, False)
        """
        name, _, given = spec.partition(":")
        several = name in ("sam", "asam") and re.search(r"(^|,)steps=", given)
        return ("ascent_steps" if several else name) == self.name


def _code(value: Any) -> str:
    return f"{value:_}" if isinstance(value, int) else repr(value)
