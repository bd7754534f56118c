"""Lookbehind: several ascent steps, a step of the base with the gradient of each, and an interpolation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack, cast

import torch
from torch import Tensor

from steppe._checks import check_count, check_unit_interval
from steppe._engine.gradients import skip_unless
from steppe._engine.slots import check_slots
from steppe.methods._base import OwnStepMethod
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import ICML, Paper
from steppe.rules import Modifier, Perturbation, Point, ScaledDirection, needs_gradient
from steppe.rules import ascent_steps as ascent_steps_of
from steppe.rules.ascent_steps import extended_ascent
from steppe.rules.l2 import L2
from steppe.rules.ops import accumulator, as_real, norm
from steppe.sam import Pass

LOOKBEHIND_PAPER = Paper(
    "mordido2024lookbehind",
    ("Gonçalo Mordido", "Pranshu Malviya", "Aristide Baratin", "Sarath Chandar"),
    "{Lookbehind-SAM}: k steps back, 1 step forward",
    "2307.16704",
    2024,
    ICML,
)


_DEFAULT_PERTURBATION = L2()


@dataclass(frozen=True)
class LookbehindAscent(Modifier):
    """Make k ascent steps of the full radius, e_i = e_{i-1} + d(g(w + e_{i-1})); |e_k| may reach k rho."""

    rule: Perturbation
    """The perturbation to repeat."""
    ascent_steps: int = 2
    """k, the number of ascent steps."""

    def __call__(self, point: Point) -> ScaledDirection:
        ascent_step = self.rule(point)
        return ascent_step if self.ascent_steps == 1 else ScaledDirection(extended_ascent(point, ascent_step))


class Lookbehind(OwnStepMethod):
    """Lookbehind: k ascent steps, one step of the base with the gradient of each, then interpolation by alpha.

    With slow weights phi, fast weights phi_0 = phi and perturbed weights phi'_0 = phi, for i = 1, ..., k:

        phi'_i = phi'_{i-1} + rho g(phi'_{i-1}) / |g(phi'_{i-1})|
        phi_i  = Base(phi_{i-1}, g(phi'_i))

    and then phi <- phi + alpha (phi_k - phi). k = 1 with alpha = 1 is SAM. The base steps k times a step, so that its
    momentum decays k times as fast and its step hooks fire k times; learning-rate schedules count steps of this
    optimizer.

    A step costs 1 + k passes. The perturbed weights do not depend on the fast ones, so that all passes come first. A
    gradient that is not finite in any of them, or an exception, leaves base and weights as they were. It keeps a copy
    of w, and within a step k - 1 gradients, the perturbation and (with alpha below 1) another copy of w; nothing from
    step to step.

    ``.grad`` after :meth:`passes` is the last of the k gradients: a change of it there (clipping, a loss scaler) does
    not change the others. Clip in a step hook of the base, ``base.register_step_pre_hook``, which gets each of them.

    Args:
        *args: The base optimizer and rho, or the class form, as for :class:`steppe.SAM`.
        ascent_steps: k, the ascent steps of a step; the authors' example has 2, and their code 5 by default.
        alpha: alpha, the share of the way to the fast weights, 0 to 1; the paper has 0.2, 0.5 and 0.8. None computes
            it for each tensor and step, (1 + cos) / 2 of the angle between phi_1 - phi and phi_k - phi.
        perturbation: The perturbation to repeat; :class:`~steppe.L2` is Lookbehind-SAM, :class:`~steppe.Adaptive`
            Lookbehind-ASAM.
        **kwargs: ``model``, ``cadence``, ``replay_rng`` as for :class:`steppe.SAM`. A step without a perturbation is
            one plain step of the base.

    Raises:
        ValueError: ascent_steps or alpha out of range; a perturbation that does not use the gradient, or makes
            several ascent steps.

    The authors' code makes 2 k passes: it takes the gradient at phi'_i twice, once for the update and once for the next
    ascent step, on the same batch. Here it is computed once; with dropout, the authors' two differ. Their ASAM uses
    the size of the weights at phi'_{i-1}, this one at phi.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Lookbehind(torch.optim.SGD([w], lr=0.1), rho=0.5, ascent_steps=2, alpha=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure)
        tensor(1., grad_fn=<SumBackward0>)
        >>> w  # 1 - 0.5 * 0.1 * (2 * 1.5 + 2 * 2.0)
        Parameter containing:
        tensor([0.6500], requires_grad=True)

    References:
        Mordido et al., Lookbehind-SAM: k Steps Back, 1 Step Forward, arXiv 2307.16704.
    """

    alpha: float | None
    paper: ClassVar[Paper] = LOOKBEHIND_PAPER
    hyperparameters: ClassVar[tuple[str, ...]] = ("alpha",)
    why_no_scaler: ClassVar[str] = "it unscales only the last of the k gradients of a step"
    why_no_accumulation: ClassVar[str] = (
        "only the last of a step's gradients is in .grad, so that there is nothing to add the others to"
    )

    def __init__(
        self,
        *args: Any,
        ascent_steps: int = 2,
        alpha: float | None = 0.5,
        perturbation: Perturbation = _DEFAULT_PERTURBATION,
        **kwargs: Any,
    ) -> None:
        check_count("ascent_steps", ascent_steps, "the number of ascent steps in a step")
        if alpha is not None:
            meaning = "the share of the way from the slow to the fast weights, and None chooses it at each step"
            check_unit_interval("alpha", alpha, meaning)
        self.alpha = alpha
        super().__init__(*args, perturbation=LookbehindAscent(perturbation, ascent_steps), **kwargs)

    def accept_perturbation(self, perturbation: Perturbation) -> Perturbation:
        """Return the ascent by a perturbation; refuse one that uses no gradient, or makes several ascent steps."""
        if not isinstance(perturbation, LookbehindAscent):
            perturbation = LookbehindAscent(perturbation, cast(LookbehindAscent, self.perturbation).ascent_steps)
        check_slots(perturbation=perturbation.rule)
        if not needs_gradient(perturbation.rule) or ascent_steps_of(perturbation.rule) > 1:
            raise ValueError(
                f"Lookbehind makes {perturbation.ascent_steps} ascent steps, each along a gradient, and "
                f"{perturbation.rule} does not fit. Give a perturbation that makes one ascent step along the gradient"
            )
        return perturbation

    def reset(self) -> None:
        """Discard the gradients of the step."""
        self._earlier: list[dict[Tensor, Tensor]] = []
        """The gradients of all ascent steps but the last, by parameter."""
        self._is_perturbed = False
        """True if the passes of this step were perturbed."""

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield the 1 + k passes of a step: at w, and after each of the k ascent steps."""
        self._earlier, self._is_perturbed = [], False
        for sam_pass in self.sam_passes(accumulate=accumulate):
            is_last = sam_pass.is_last
            self._is_perturbed = sam_pass.is_perturbed
            sam_pass.is_last = is_last or sam_pass.is_perturbed  # every perturbed pass gives an update gradient
            yield sam_pass
            if sam_pass.is_perturbed and not is_last:
                self._earlier.append(self.gradients.copies())

    @torch.no_grad()
    def step_base(self) -> bool:
        """Step the base with each of the k gradients, then interpolate between the old and the new weights by alpha."""
        gradients, earlier = self.gradients, self._earlier
        self._earlier = []
        if not self._is_perturbed or (not earlier and self.alpha == 1):
            return self.step_base_once()
        last = {p: p.grad for p in gradients.parameters() if p.grad is not None}
        finite = norm(gradients.views(last)).isfinite()
        if finite.is_cpu and not finite:
            return self.step_base_once()  # warns, and counts the skipped step
        slow = {p: p.detach().clone() for p in self.trained_parameters()} if self.alpha != 1 else {}
        first: dict[Tensor, Tensor] = {}
        skipped = gradients.skipped
        for gradient in earlier:
            if not finite.is_cpu:
                skip_unless(finite, list(gradient.values()))
            self._replace_gradients(gradient)
            self.step_base_once()
            if self.alpha is None and not first:
                first = {p: p.detach().clone() for p in slow}
        gradients.skipped = skipped  # a skipped step counts once, by the last step of the base
        self._replace_gradients(last)
        stepped = self.step_base_once()
        for p, start in slow.items():
            alpha = self.alpha if self.alpha is not None else _alignment(first.get(p, p), p, start)
            as_real(p.detach()).lerp_(as_real(start), 1 - alpha)
        return stepped

    def _replace_gradients(self, gradient: dict[Tensor, Tensor]) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = gradient.get(p)


def _alignment(first: Tensor, last: Tensor, start: Tensor) -> Tensor:
    """Return (1 + cos) / 2 of the angle between first - start and last - start."""
    wide = accumulator(start.device)
    a, b = (as_real(end.detach() - start).flatten().to(wide) for end in (first, last))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0, eps=torch.finfo(wide).tiny)
    return ((1 + cosine) / 2).to(as_real(start).dtype)


def lookbehind_sam(
    base_optimizer: Base,
    rho: Rho = 0.05,
    *,
    ascent_steps: int = 2,
    alpha: float | None = 0.5,
    **options: Unpack[Options],
) -> Lookbehind:
    """Lookbehind: K ascent steps, a step of the base for each, and a share alpha of the way. 1 + K passes per step.

    w <- w + alpha (w_K - w), where w_i is a step of the base from w_{i-1} with the gradient after i ascent steps.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the length of each ascent step; 0.05 in the official code.
        ascent_steps: K; 2 in the authors' example, and 5 is their default.
        alpha: alpha, the share of the way; usually 0.2, 0.5 or 0.8. None chooses it for each tensor and step.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> lookbehind_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).alpha
        0.5

    References:
        Mordido et al., Lookbehind-SAM: k Steps Back, 1 Step Forward, arXiv 2307.16704.
    """
    return Lookbehind(base_optimizer, rho, ascent_steps=ascent_steps, alpha=alpha, **options)


CARD = MethodCard(
    name="lookbehind_sam",
    function=lookbehind_sam,
    label="Lookbehind",
    paper=LOOKBEHIND_PAPER,
    summary="Make K ascent steps and a step of the base with the gradient of each, then move a share alpha of the way. "
    "The base's momentum gets K gradients per step.",
    equation="up_i = up_{i-1} + rho g(up_{i-1}) / |g(up_{i-1})|       from up_0 = w, for i = 1..K\n"
    "down_i = Base(down_{i-1}, g(up_i))                        from down_0 = w\n"
    "w <- w + alpha (down_K - w)                                  K = ascent_steps",
    cost="1 + ascent_steps",
    passes=lambda ascent_steps: 1 + ascent_steps,
    memory=f"{COPY}; within a step K - 1 gradients, the perturbation, and with alpha below 1 another copy",
    when="To perturb farther than one ascent step, if the further passes are affordable.",
    when_not="With a loss scaler or gradient accumulation: both are errors.",
    usual={
        "rho": "0.05 (official code)",
        "ascent_steps": "2 in the authors' example, 5 their default",
        "alpha": "0.2, 0.5 or 0.8; None chooses it for each tensor and step",
    },
    verified="official code, same steps",
    checked="https://github.com/chandar-lab/Lookbehind-SAM: 20 steps in float64 agree. It makes 2 K passes, because "
    "it computes each gradient twice (with dropout, the two differ); here each is computed once. Its variant of ASAM "
    "scales by the perturbed weights, ours by w.",
    caveats=(
        "The base takes K steps per step: its momentum decays K times as fast, and its hooks are called K times.",
        "Clip in a step hook of the base; `.grad` after the passes is only the last of K gradients.",
    ),
    comparison=Comparison(summary="several ascent steps and a step of the base for each, at SAM's rho"),
)
