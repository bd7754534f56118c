"""The card of a method: what a reader must know before using it, and how `steppe compare` runs it."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from steppe.methods._step_function import StepFunction
from steppe.papers import Paper, citation, papers_of
from steppe.sam import SAM

COPY = "a copy of the weights, allocated once"
COPY_AND_G = f"{COPY}; g until the second pass is done"
TOTAL_STEPS = "the number of optimizer steps in the training"
NO_CODE = "No code by the authors was found to compare with."
USUAL_RATIO = "the ratio of the usual values"
FIRST_GUESS = "a first guess, not measured"
SEARCHED = "found by a search: more costs accuracy"

Verified = Literal[
    "official code, same steps",
    "official code, read",
    "other code, same steps",
    "other code, read",
    "texts only",
    "nothing else",
]
VERIFIED: Mapping[Verified, str] = MappingProxyType(
    {
        "official code, same steps": "The official code was run, and takes the same steps.",
        "official code, read": "The official code was read.",
        "other code, same steps": "Other code than the authors' was run, and takes the same steps.",
        "other code, read": "Other code than the authors' was read.",
        "texts only": "Only texts were read, no code.",
        "nothing else": "Not compared with other code.",
    }
)
"""What an implementation can be verified against, and the sentence that says so on the card's page."""


@dataclass(frozen=True)
class Comparison:
    """How `steppe compare` builds and runs a method.

    `build` and `step_function` take an optimizer first: the base, and the optimizer that was built. Their further
    parameters are filled by name, from the run context where it has them, else from the method spec, else from their
    defaults.
    """

    summary: str
    """One line for `steppe compare --help`."""
    build: Callable[..., Optimizer] | None = None
    """Build the optimizer around a base optimizer; None is the card's function."""
    passes: Fraction | float | Callable[..., Fraction | float] | None = None
    """Planned passes per step; a function takes arguments of the spec by name. None is the card's number."""
    step_function: Callable[..., StepFunction] = StepFunction
    """Builds the object that takes the steps of a run."""
    rho_factor: float = 1.0
    """Factor from the recipe's rho (SAM's) to the method's own, where the spec gives none."""
    needs_momentum: bool = False
    """True if the method perturbs along the base's momentum."""
    capturable: bool = False
    """True if one CUDA graph per kind of step can be replayed for all: nothing but the cadence is decided on the host,
    and no random numbers depend on the step's number."""


def plain_base(base: Optimizer) -> Optimizer:
    """Return the base optimizer itself, for methods that act in the loss."""
    return base


@dataclass(frozen=True)
class MethodCard:
    """The card of a method: its description, and what the tests and the comparison need to run it."""

    name: str
    """Name of the method and of its file."""
    function: Callable[..., Any]
    """The function that builds it; :mod:`steppe.variants` exports it if it has the method's name."""
    label: str
    """Name in tables and figures."""
    paper: Paper
    """The paper that proposes the method."""
    summary: str
    """What it does, in two sentences."""
    equation: str
    """The update in the notation of the documentation; lines separated by newlines."""
    cost: str
    """Passes (forward and backward over the batch) per step, in words."""
    passes: Callable[..., float] | float | None
    """The same as a number; a function takes arguments of the method by name; None where the gradients decide."""
    memory: str
    """What is kept beside the base."""
    when: str
    """When to use it."""
    when_not: str
    """When not to use it."""
    usual: Mapping[str, str]
    """Each hyperparameter with its usual values in the literature."""
    verified: Verified
    """What it was compared with beside the tests' reference in the paper's notation; VERIFIED says it in a sentence."""
    caveats: Sequence[str]
    """What surprises a user, one sentence or two each."""
    checked: str = ""
    """Where that code or text is, the differences from it, and their reasons."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Arguments without a default, with the values of an example."""
    short_run: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments with which a run of a few steps does all that the method does; for tests and benchmarks."""
    build_example: Callable[..., tuple[Any, ...]] | None = None
    """(base, model, **arguments) -> the optimizer and the other parts; None is ``function(base, model=model, ...)``."""
    arguments_of: tuple[Callable[..., Any], ...] = ()
    """The functions whose arguments are the hyperparameters; empty for ``function`` alone."""
    usage_code: str = ""
    """Lines of code that use it; empty for one call of ``function``."""
    comparison: Comparison | None = None
    """How `steppe compare` runs it; None for a method that is an argument of another one."""
    other_measurements: Sequence[str] = ()
    """Results on the pages of docs/evidence: Markdown, with links as in docs/methods, one sentence or two each."""
    needs_adapters: bool = False
    """True if it trains LoRA adapters of PEFT and nothing else; :mod:`steppe.integrations.peft` exports it."""

    @property
    def usage(self) -> str:
        """Lines of code that use it, around a ``base`` and a ``model``."""
        if self.usage_code:
            return self.usage_code
        arguments = "".join(f", {name}={_literal(value)}" for name, value in self.required.items())
        if self.needs_adapters:
            call = f"{self.name}(base{arguments}, model=model)"
            return f"from steppe.integrations.peft import {self.name}\n\noptimizer = {call}"
        return f"optimizer = steppe.variants.{self.name}(base{arguments}, model=model)"

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The default values of its arguments; those without one are missing."""
        functions = self.arguments_of or (self.function,)
        parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def passes_with(self, **arguments: Any) -> float | None:
        """Return the planned passes per step with arguments of the method; None where the gradients decide.

        Example:
            >>> from steppe.methods.looksam import CARD
            >>> CARD.passes_with(interval=2)
            1.5
        """
        if not callable(self.passes):
            return self.passes
        values = {**self.defaults, **self.required, **arguments}
        return self.passes(**{name: values[name] for name in inspect.signature(self.passes).parameters})

    def short_arguments(self, **run: Any) -> dict[str, Any]:
        """Return arguments for a short run: ``short_run``, and those of ``run`` that the method requires.

        Example:
            >>> from steppe.methods.late_sam import CARD
            >>> CARD.short_arguments(total_steps=20, samples=8)
            {'total_steps': 20}
        """
        return {**{name: value for name, value in run.items() if name in self.required}, **self.short_run}

    def example(self, base: Optimizer, model: nn.Module, **arguments: Any) -> tuple[Any, ...]:
        """Return an optimizer that uses the method, and the other parts of Steppe that it uses.

        Example:
            >>> from steppe.methods.gsam import CARD
            >>> model = nn.Linear(2, 2)
            >>> CARD.example(torch.optim.SGD(model.parameters(), lr=0.1), model)[0].combination
            SurrogateGap(alpha=0.2)
        """
        arguments = {**self.required, **arguments}
        if self.build_example is not None:
            return self.build_example(base, model, **arguments)
        return (self.function(base, **arguments, model=model),)

    @property
    def papers(self) -> tuple[Paper, ...]:
        """All papers to cite; SAM's own first, where it is used."""
        return tuple(dict.fromkeys(paper for part in self._example_parts() for paper in papers_of(part)))

    def bibtex(self) -> str:
        """Return the BibTeX entries of all papers to cite.

        Example:
            >>> from steppe.methods.gsam import CARD
            >>> CARD.bibtex().count("@")
            2
        """
        return citation(*self._example_parts())

    def _example_parts(self) -> tuple[Any, ...]:
        if self.needs_adapters:  # no example without PEFT, which may not be installed
            return SAM, self.function
        model = nn.Sequential(nn.LayerNorm(1))
        return self.example(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def covers(self, spec: str) -> bool:
        """Return True if results of a method spec of `steppe compare` belong on this card.

        Example:
            >>> from steppe.methods import ascent_steps, sam
            >>> ascent_steps.CARD.covers("sam:ascent_steps=2"), sam.CARD.covers("sam:ascent_steps=2")
            (True, False)
        """
        name, _, arguments = spec.partition(":")
        several = name in ("sam", "asam") and re.search(r"(^|,)ascent_steps=", arguments)
        return ("ascent_steps" if several else name) == self.name


def _literal(value: Any) -> str:
    return f"{value:_}" if isinstance(value, int) else repr(value)
