"""What a rule sees, and the three questions that a rule can answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from steppe._tensors.ops import as_real, norm

Memory: TypeAlias = dict[str, dict[Tensor, dict[str, Tensor]]]
"""Rule name -> parameter -> the rule's own tensors."""


@dataclass(frozen=True)
class Point:
    """Where the optimizer stands: what a rule sees at w.

    All sequences run in parallel, one entry a parameter that has a gradient. Complex parameters appear as real views
    with a last dimension of 2, as ``torch.optim`` treats them.
    """

    parameters: Sequence[Tensor]
    """The parameters themselves (w, or w + e while the second pass has not come back)."""
    gradients: Sequence[Tensor]
    """g, the gradient of the first pass: real, of the shapes of ``weights``. It is empty where nobody needs it: for
    a perturbation with ``needs_gradient = False``, and after a climb for a combination without ``needs_unperturbed_gradient``."""
    rho: Sequence[float | Tensor]
    """The neighborhood radius of each parameter's group."""
    base_state: Sequence[Mapping[str, Any]]
    """The base optimizer's state of each parameter (momentum buffers, ...), to be read only."""
    step: int
    """How many steps were taken before this one."""
    memory: Memory = field(default_factory=dict)
    """The tensors that rules keep from step to step; a rule asks for its own with :meth:`memory_of`."""
    ascent_so_far: "ScaledDirection | None" = None
    """The climb at whose end the gradients were taken, within a step of several climbs; None for gradients at w."""
    anchor: Tensor | None = None
    """A parameter that is always the same one, for what a rule keeps once and not for each parameter."""

    @cached_property
    def weights(self) -> list[Tensor]:
        """The parameters' values as real tensors without autograd."""
        return [as_real(p.detach()) for p in self.parameters]

    def restricted(self, to: Sequence[int]) -> "Point":
        """The same point seen by a rule that looks at some of the parameters only, given by their positions."""
        return replace(
            self,
            parameters=[self.parameters[i] for i in to],
            gradients=[self.gradients[i] for i in to] if self.gradients else [],
            rho=[self.rho[i] for i in to],
            base_state=[self.base_state[i] for i in to],
            ascent_so_far=self.ascent_so_far
            and ScaledDirection([self.ascent_so_far.direction[i] for i in to], self.ascent_so_far.scale),
        )

    def memory_of(self, rule: object) -> list[dict[str, Tensor]]:
        """This rule's own tensors for each parameter, to read and to fill; they are saved in checkpoints."""
        own = self.memory.setdefault(type(rule).__name__, {})
        return [own.setdefault(p, {}) for p in self.parameters]

    def shared_memory_of(self, rule: object) -> dict[str, Tensor]:
        """What this rule keeps once, such as a running mean of |g|: to read and to fill; saved in checkpoints."""
        anchor = self.parameters[0] if self.anchor is None else self.anchor
        return self.memory.setdefault(type(rule).__name__, {}).setdefault(anchor, {})

    @cached_property
    def gradient_norm(self) -> Tensor:
        """|g|, over all parameters together: a 0-dim tensor, computed once."""
        return norm(self.gradients)


class ScaledDirection(NamedTuple):
    """The climb of a perturbation, without its length: e = rho * scale * direction."""

    direction: Sequence[Tensor | None]
    """One real tensor a parameter, which is only read; None for a parameter that stays at w."""
    scale: Tensor | float = 1.0
    """What makes rho the radius in the rule's norm; a 0-dim tensor when it depends on values."""


class Perturbation(Protocol):
    """Which way up: Point -> e, given as an :class:`ScaledDirection`.

    A rule that does not look at the gradient may say so with a class attribute ``needs_gradient = False``. A step that
    climbs is then one pass, at w + e, unless the combination wants g too; its Point has every trainable parameter, and
    no gradients. A rule that climbs K times says ``ascent_steps = K``: it is asked K times, each time with the gradient at
    the end of the climb before and that climb as ``point.ascent_so_far``, and answers with the whole climb from w. One whose e
    is the same for any multiple of the gradient may say ``scale_free = True``, which saves a copy of the gradient where
    a loss scaler is in use.
    """

    def __call__(self, point: Point, /) -> ScaledDirection:
        """Return the climb from w."""


def needs_gradient(rule: "Perturbation | Cadence") -> bool:
    """Whether the rule needs the gradient at w, and so a pass at w before it is asked."""
    return bool(getattr(rule, "needs_gradient", True))


def ascent_steps(perturbation: Perturbation) -> int:
    """How many climbs, each with a pass at its end, a step makes that climbs."""
    return int(getattr(perturbation, "ascent_steps", 1))


def scale_free(rule: "Perturbation | Combination | Cadence") -> bool:
    """Whether a multiple of all gradients changes nothing but the length of what goes down.

    A loss scaler multiplies the gradients by a number that changes on the way. What depends on their size, such as a
    running mean that they are compared with, has to see them without it; that costs a copy of the gradient.
    """
    return bool(getattr(rule, "scale_free", False))


class Combination(Protocol):
    """Which gradient goes down: (clean, perturbed) -> what the base optimizer gets."""

    @property
    def needs_unperturbed_gradient(self) -> bool:
        """Whether g is needed after the second pass; it costs one copy of the gradient."""

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None, /) -> Sequence[Tensor]:
        """Return one gradient a parameter; ``perturbed`` is None at a step that did not climb."""


class Cadence(Protocol):
    """When to pay: Point -> climb at this step or not.

    A rule that looks at no more than ``at.step`` may say so with a class attribute ``needs_gradient = False``: it is
    then asked before the first pass, so that it is known what that pass is for.
    """

    def __call__(self, point: Point, /) -> bool:
        """Return whether to climb."""
