"""The report of an optimizer: what its steps did, and hints where that is suspicious."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.engine import Engine
from steppe._engine.groups import RHO
from steppe._engine.joint_base import names_of
from steppe._engine.recorder import Sample
from steppe._engine.rounding import is_half
from steppe.rules import Cadence

# Measured on small networks with rho = 0.05 and a hundred times less or more (tests/engine/test_report.py): the
# gradient at w + e differs by 2 to 60 %, by less than 1.1 %, and by more than 80 %.
_UNCHANGED, _NEARLY_UNCHANGED, _OTHER_GRADIENT = 0.015, 0.05, 0.7
_FLAT, _STEEP = 0.002, 0.5
"""L(w + e) - L(w) in units of |L(w)|."""
_FAR = 0.02
"""|e| in units of |w|."""


@dataclass(frozen=True)
class Measured:
    """What the perturbations did to some weights: medians over the measured steps, None if it was not measured."""

    rho: float | None
    """The radius in the last measured step; that of all groups together is None where the groups differ."""
    weight_norm: float | None
    """|w|."""
    perturbation_norm: float | None
    """|e| that arrived in the weights, after rounding."""
    length_in_rho: float | None
    """|e| in units of rho: 1 for all groups together with :class:`~steppe.L2`; less in a group, or if weights in half
    precision round much of e to nothing. Rules with another norm (ASAM) have other values."""
    cosine: float | None
    """Cosine of g and g_s, the gradients at w and at w + e."""
    gradient_difference: float | None
    """|g_s - g| in units of |g|."""


@dataclass(frozen=True)
class Report(Measured):
    """What an optimizer has done since it was made or loaded; see :meth:`steppe.SAM.report`; ``print`` shows it."""

    optimizer: str
    """Names of the optimizer and its base."""
    steps: int
    """Steps of the base: with passes and without."""
    perturbed_steps: int
    """Steps with a perturbation."""
    skipped_steps: int
    """Steps that were skipped because a gradient was not finite."""
    measured_steps: int
    """Perturbed steps in the medians: the latest 32 of the steps 0, 8, 64, 128, 256, 384, ..."""
    loss: float | None
    """L(w); known from ``step(closure)``, ``Pass.record_loss`` and the trainers of ``steppe.integrations``."""
    perturbed_loss: float | None
    """L(w + e)."""
    loss_difference: float | None
    """L(w + e) - L(w)."""
    groups: tuple[Measured, ...]
    """The same measures for each parameter group."""
    hints: tuple[str, ...]
    """What looks like a mistake, and what to do about it; empty if nothing does."""

    def __str__(self) -> str:
        lines = [
            f"{self.optimizer}: {self.steps} steps, {self.perturbed_steps} of them perturbed; {self.skipped_steps} "
            "skipped as not finite"
        ]
        if self.measured_steps:
            names = ["rho", "|w|", "|e|", "|e|/rho", "cos(g, g_s)", "|g_s - g|/|g|"]
            rows = {f"group {i}": group for i, group in enumerate(self.groups)} if len(self.groups) > 1 else {}
            rows["all" if rows else ""] = self
            lines.append(f"medians of {self.measured_steps} measured steps:")
            lines.append(" " * 10 + "".join(name.rjust(15) for name in names))
            lines += [name.ljust(10) + "".join(_text(v).rjust(15) for v in _values(row)) for name, row in rows.items()]
        if self.loss_difference is not None:
            lines.append(
                f"L(w) = {_text(self.loss)}, L(w + e) = {_text(self.perturbed_loss)}, "
                f"difference {_text(self.loss_difference)}"
            )
        lines += [f"hint: {hint}" for hint in self.hints]
        return "\n".join(lines)


def _values(row: Measured) -> list[float | None]:
    return [
        row.rho,
        row.weight_norm,
        row.perturbation_norm,
        row.length_in_rho,
        row.cosine,
        row.gradient_difference,
    ]


def _percent(value: float) -> str:
    return f"{float(f'{100 * value:.2g}'):g} %"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


class Reporting:
    """The method of :class:`steppe.SAM` that reports."""

    base: Optimizer
    cadence: Cadence
    stochastic_rounding: bool
    perturbs: ClassVar[bool] = True
    """False for a method that never perturbs: that it does not is no mistake."""
    _engine: Engine

    def report(self) -> Report:
        """Return what the steps so far did, with hints where that looks like a mistake.

        The counts are of all steps since the optimizer was made, loaded or copied; lengths, gradients and losses are
        measured in few of them (``measured_steps``), which takes well below 1 % of the time. Nothing is read
        from the device before this call. Of more than a million weights, gradients are compared in a million entries.
        With sharded parameters, all ranks measure together, and any rank may call this method alone. The mode of the
        model, training or evaluation, is known with ``model=`` only.

        Example:
            >>> import steppe, torch
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
            >>> loss = optimizer.step(lambda: w.square().sum())
            >>> report = optimizer.report()
            >>> report.perturbed_steps, round(report.length_in_rho, 3), round(report.cosine, 3), report.hints
            (1, 1.0, 1.0, ())
        """
        recorder = self._engine.recorder
        samples = [_read(sample) for sample in recorder.samples]
        count = len(self.base.param_groups)
        samples = [s for s in samples if len(s.rho) == count]  # a group may have been added since
        everything = _measured(samples, range(count))
        losses = [(s.loss, s.perturbed_loss) for s in samples if s.loss is not None and s.perturbed_loss is not None]
        losses = [pair for pair in losses if all(map(math.isfinite, pair))]
        groups = tuple(_measured(samples, [i]) for i in range(count))
        report = Report(
            **vars(everything),
            optimizer=f"{type(self).__name__} around {names_of(self.base)}",
            steps=recorder.steps + recorder.plain_steps,
            perturbed_steps=recorder.perturbed_steps,
            skipped_steps=int(self._engine.gradients.skipped),
            measured_steps=len(samples),
            loss=_median(at_w for at_w, _ in losses),
            perturbed_loss=_median(perturbed for _, perturbed in losses),
            loss_difference=_median(perturbed - at_w for at_w, perturbed in losses),
            groups=groups,
            hints=(),
        )
        return replace(report, hints=tuple(self._hints(report, relative_rise=_relative_rise(losses))))

    def _hints(self, report: Report, *, relative_rise: float | None) -> list[str]:
        hints = [*self._hints_of_activity(report), *self._hints_of_radius(report, relative_rise)]
        halves = {p.dtype for group in self.base.param_groups for p in group["params"] if is_half(p)}
        if halves and not self.stochastic_rounding:
            hints.append(
                f"weights in {', '.join(sorted(map(str, halves)))}: the part of a perturbation that is smaller than "
                f"their last bit is lost (|e|/rho is {_text(report.length_in_rho)}). Keep the weights in float32 and "
                "train under torch.autocast, or give SAM stochastic_rounding=True"
            )
        in_evaluation = self._engine.recorder.steps_in_evaluation_mode
        if in_evaluation:
            hints.append(
                f"the model was in evaluation mode in {in_evaluation} perturbed steps: dropout is off, and BatchNorm "
                "uses and keeps its running statistics. Call model.train() before the training loop, and again after "
                "each evaluation"
            )
        return hints

    def _hints_of_activity(self, report: Report) -> list[str]:
        """Return hints for steps or groups without a perturbation."""
        if not report.steps:
            return []
        recorder, groups = self._engine.recorder, self.base.param_groups
        if self.perturbs and all(_is_zero(group[RHO]) for group in groups):
            return [
                "never active: sam_rho is 0 in every group, so that each step is one of the base. Set optimizer.rho"
            ]
        if recorder.plain_steps and not recorder.steps:
            return [
                "never active: every step was taken without passes, as a plain step of the base. Give step() a "
                "closure, or run forward and backward in `for sam_pass in optimizer.passes(): with sam_pass: ...`"
            ]
        if not self.perturbs:
            return []
        if not report.perturbed_steps:
            if self._engine.has_warned("no gradient"):
                return [
                    "never active: no pass made a gradient for a parameter of the optimizer. Call backward() in each "
                    "pass, on a loss that depends on these parameters"
                ]
            return [f"never active: {self.cadence} has perturbed none of {report.steps} steps. Check its arguments"]
        if report.perturbation_norm == 0:
            return ["never active: the perturbation was zero in every measured step, as is a gradient of zero at w"]
        hints = []
        for i, (group, measured) in enumerate(zip(groups, report.groups, strict=True)):
            if group["params"] and measured.perturbation_norm == 0:
                names = "no parameter of it got a gradient, or the perturbation leaves it out"
                if _is_zero(group[RHO]):
                    names = "its sam_rho is 0"
                elif not any(p.requires_grad for p in group["params"]):
                    names = "none of its parameters requires a gradient"
                hints.append(
                    f"group {i} ({len(group['params'])} parameters) is never perturbed: {names}. If that is not "
                    "intended, set its sam_rho, or check that the loss depends on its parameters"
                )
        return hints

    def _hints_of_radius(self, report: Report, relative_rise: float | None) -> list[str]:
        """Return hints for a radius that is orders of magnitude too small or too large."""
        difference, length, weights = report.gradient_difference, report.perturbation_norm, report.weight_norm
        if not difference or not length or not weights:
            return []
        rises = "" if relative_rise is None else f", and the loss by {_percent(relative_rise)}"
        found = f"the gradient at w + e differs by {_percent(difference)} from that at w{rises}"
        flat = relative_rise is not None and relative_rise < _FLAT
        if difference < _UNCHANGED or (difference < _NEARLY_UNCHANGED and flat):
            return [
                f"rho may be too small (|e|/|w| = {length / weights:.1e}): {found}, so that a step is nearly one of "
                "the base. Try ten times as much; usual radii are 0.01 to 0.2 for SAM, and 0.5 to 2 for ASAM"
            ]
        steep = relative_rise is None or relative_rise > _STEEP
        if difference > _OTHER_GRADIENT and steep and length > _FAR * weights:
            return [
                f"rho may be too large (|e|/|w| = {length / weights:.1e}): {found}, so that w + e is no neighbor of w "
                "any more. Try a tenth of it; usual radii are 0.01 to 0.2 for SAM, and 0.5 to 2 for ASAM"
            ]
        return []


@dataclass(frozen=True)
class _Read:
    """A sample as numbers."""

    rho: list[float]
    lengths: list[list[float]]
    angles: list[list[float]] | None
    loss: float | None
    perturbed_loss: float | None


def _read(sample: Sample) -> _Read:
    return _Read(
        [float(rho) for rho in sample.rho],
        sample.lengths.tolist(),
        None if sample.angles is None else sample.angles.tolist(),
        None if sample.loss is None else float(sample.loss),
        None if sample.perturbed_loss is None else float(sample.perturbed_loss),
    )


def _measured(samples: Sequence[_Read], groups: Sequence[int]) -> Measured:
    """Return the measures of some groups together."""
    lengths, weights, in_rho, cosines, differences = [], [], [], [], []
    for sample in samples:
        lengths.append(math.sqrt(sum(sample.lengths[i][0] for i in groups)))
        weights.append(math.sqrt(sum(sample.lengths[i][1] for i in groups)))
        if any(sample.rho[i] for i in groups):
            in_rho.append(math.sqrt(sum(sample.lengths[i][0] / sample.rho[i] ** 2 for i in groups if sample.rho[i])))
        if sample.angles is not None:
            g, between, g_s = (math.sqrt(sum(sample.angles[i][k] for i in groups)) for k in range(3))
            if g > 0 and g_s > 0:
                cosines.append(max(-1.0, (g / g_s + g_s / g - between / g * (between / g_s)) / 2))
            if g > 0:
                differences.append(between / g)
    radii = {sample.rho[i] for sample in samples[-1:] for i in groups}
    return Measured(
        rho=radii.pop() if len(radii) == 1 else None,
        weight_norm=_median(weights),
        perturbation_norm=_median(lengths),
        length_in_rho=_median(in_rho),
        cosine=_median(cosines),
        gradient_difference=_median(differences),
    )


def _relative_rise(losses: Sequence[tuple[float, float]]) -> float | None:
    return _median((perturbed - at_w) / abs(at_w) for at_w, perturbed in losses if at_w != 0)


def _median(values: Any) -> float | None:
    """Return the median of the finite values, or None if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return median(finite) if finite else None


def _is_zero(rho: float | Tensor) -> bool:
    return float(rho) == 0
