"""The interface of rules: the :class:`Point` that a rule gets, and the three protocols."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from steppe._tensors.in_place import as_real
from steppe._tensors.reductions import norm

Memory: TypeAlias = dict[str, dict[Tensor, dict[str, Tensor]]]
"""Name of the rule -> parameter -> the tensors of the rule."""


@dataclass(frozen=True)
class Point:
    """The state of the optimizer at w, as a rule gets it.

    All sequences are parallel, with one entry per parameter that has a gradient. Complex parameters appear as real
    views with a last dimension of 2, as ``torch.optim`` treats them.
    """

    parameters: Sequence[Tensor]
    """The parameters themselves: w, or w + e until the second pass has restored them."""
    gradients: Sequence[Tensor]
    """g, the gradient of the first pass: real, of the shapes of ``weights``. Empty for a perturbation with
    ``needs_gradient = False``, and, at a perturbed step, for a combination without ``needs_unperturbed_gradient``."""
    rho: Sequence[float | Tensor]
    """rho, the radius of each parameter's group."""
    base_state: Sequence[Mapping[str, Any]]
    """The base optimizer's state of each parameter (momentum buffers, ...); read only."""
    step: int
    """The number of steps before this one."""
    memory: Memory = field(default_factory=dict)
    """The tensors that rules keep from step to step; :meth:`memory_of` returns those of one rule."""
    ascent_so_far: "ScaledDirection | None" = None
    """The perturbation at which the gradients were computed, between several ascent steps; None for gradients at w."""
    anchor: Tensor | None = None
    """A fixed parameter, the key of what a rule keeps once and not per parameter; None is the first one."""
    micro_batch: int = 0
    """The number of micro-batches of this step before this one, where each has a perturbation of its own."""

    @cached_property
    def weights(self) -> list[Tensor]:
        """The values of the parameters as real tensors without autograd."""
        return [as_real(p.detach()) for p in self.parameters]

    def restricted(self, to: Sequence[int]) -> "Point":
        """Return this point with the parameters at some positions only."""
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
        """Return a rule's dictionary of tensors for each parameter, to read and to fill; checkpoints contain them."""
        own = self.memory.setdefault(type(rule).__name__, {})
        return [own.setdefault(p, {}) for p in self.parameters]

    def shared_memory_of(self, rule: object) -> dict[str, Tensor]:
        """Return the tensors that a rule keeps once, such as a running mean of |g|; checkpoints contain them."""
        anchor = self.parameters[0] if self.anchor is None else self.anchor
        return self.memory.setdefault(type(rule).__name__, {}).setdefault(anchor, {})

    @cached_property
    def gradient_norm(self) -> Tensor:
        """|g| over all parameters together: a 0-dim tensor, computed once."""
        return norm(self.gradients)


class ScaledDirection(NamedTuple):
    """A perturbation in units of rho: e = rho * scale * direction."""

    direction: Sequence[Tensor | None]
    """One real tensor per parameter, which is only read; None for a parameter that is not perturbed."""
    scale: Tensor | float = 1.0
    """The factor that makes rho the radius in the rule's norm; a 0-dim tensor if it depends on values."""


class Perturbation(Protocol):
    """A function from the point to e, as a :class:`ScaledDirection`.

    Optional class attributes declare what the rule needs:

    - ``needs_gradient = False``: e does not depend on the gradient. A perturbed step is then a single pass, at w + e,
      unless the combination needs g; the point has every trainable parameter, and no gradients.
    - ``follows_gradient = True``: e follows gradients of earlier steps, see :func:`~steppe.rules.follows_gradient`.
    - ``ascent_steps = K``: the rule makes K ascent steps. It is called K times, each time with the gradient at the
      perturbation so far, which is ``point.ascent_so_far``, and returns the whole perturbation from w.
    - ``scale_free = True``: the rule works alike on gradients times a loss scale, see :func:`~steppe.rules.scale_free`.
    - ``averages_memory = True``: the rule keeps a mean in its memory, see :func:`~steppe.rules.averages_memory`.
    """

    def __call__(self, point: Point, /) -> ScaledDirection:
        """Return the perturbation from w."""


def needs_gradient(rule: "Perturbation | Combination | Cadence") -> bool:
    """Return True if the rule needs a gradient: a perturbation or a cadence, and so a pass at w before it is called."""
    return bool(getattr(rule, "needs_gradient", True))


def follows_gradient(perturbation: Perturbation) -> bool:
    """Return True if e is made of gradients of the loss: ``maximize=True`` then changes its sign.

    By default, if the rule needs the gradient. Noise has no sign, and the momentum of the base has the changed one.
    """
    return bool(getattr(perturbation, "follows_gradient", needs_gradient(perturbation)))


def ascent_steps(perturbation: Perturbation) -> int:
    """Return the number of ascent steps in a perturbed step; each is followed by a pass."""
    return int(getattr(perturbation, "ascent_steps", 1))


def scale_free(rule: "Perturbation | Combination | Cadence") -> bool:
    """Return True if the rule works alike on all gradients times any c > 0, such as a loss scale.

    A perturbation then gives the same e, a cadence the same decision, and a combination c times the update gradient.
    Any other rule, such as one with a running mean, must get the gradients without the loss scale, which costs a copy.
    """
    return bool(getattr(rule, "scale_free", False))


def averages_memory(rule: "Perturbation | Combination | Cadence") -> bool:
    """Return True if the mean of what the rule keeps of micro-batches is what it keeps of them together.

    So it is for a running mean of the gradient. A rule with any other memory raises an error where each micro-batch has
    a perturbation of its own: the micro-batches would change that memory one after the other.
    """
    return bool(getattr(rule, "averages_memory", False))


class Combination(Protocol):
    """A function from the gradients at w and at w + e to the update gradient."""

    @property
    def needs_unperturbed_gradient(self) -> bool:
        """True if g is needed after the second pass, which costs one copy of the gradient."""

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None, /) -> Sequence[Tensor]:
        """Return one gradient per parameter; ``perturbed`` is None at a step without perturbation."""


class Cadence(Protocol):
    """A function from the point to True if this step is perturbed.

    A rule that uses no more than ``point.step`` declares ``needs_gradient = False``, a class attribute: it is then
    called before the first pass, so that this pass can be the only one, or use a part of the batch.
    """

    def __call__(self, point: Point, /) -> bool:
        """Return True to perturb."""
