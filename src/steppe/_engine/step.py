"""One step of SAM, part by part: its beginning, its passes, its update gradient, and the base's step.

All three APIs of :class:`steppe.SAM` are made of these parts. :class:`steppe.methods._base.OwnStepMethod` is the
interface for methods that replace some of them, and documents when each is called and its result.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steppe._engine.callers import called_by_trainer
from steppe._engine.capture import GraphCapture
from steppe._engine.closure import Closure, check_closure, run_closure
from steppe._engine.constructor import check_groups, check_model, holds_any, one_module
from steppe._engine.groups import parameters_of
from steppe._engine.joint_base import names_of
from steppe._engine.loss_scale import (
    ScalerTarget,
    check_scale,
    check_unscaled,
    loss_scale,
    refuse_closure_of_scaler,
)
from steppe._engine.losses import backward
from steppe._engine.passes import BACKWARD_OUTSIDE, Pass
from steppe._engine.report import Reporting
from steppe._engine.shared import Shared
from steppe._engine.slots import OPTIONS, Option, Rule, check_per_rank, check_subset, with_parameters
from steppe._engine.stage import Stage, out_of_order
from steppe._engine.wrapper import Wrapper
from steppe._tensors.reductions import norm
from steppe.rules import Combination, Memory, Perturbation, Point, ascent_steps, needs_gradient
from steppe.rules.l2 import L2
from steppe.rules.perturbed_gradient import PerturbedGradient


class SAMStep(GraphCapture, Reporting, Wrapper):
    """The parts of a step of :class:`steppe.SAM`, in their order."""

    model = Option[nn.Module | None](None)
    perturbation = Rule[Perturbation](L2())
    combination = Rule[Combination](PerturbedGradient())
    per_rank = Option(False)
    stochastic_rounding = Option(False)
    scaler = Shared[torch.amp.GradScaler | None](None)
    _scaler_target: ScalerTarget

    def accept_perturbation(self, perturbation: Perturbation) -> Perturbation:
        """Return the perturbation in the form in which this optimizer uses it, at the constructor and when assigned.

        A method may override this to refuse one that does not fit, with a ValueError, or to build its own upon it. It
        also gets what it returned before, and returns that.
        """
        return perturbation

    def change_option(self, name: str, value: Any) -> Any:
        """Let an option that is assigned take effect; return the value to keep.

        Raises:
            RuntimeError: A step is pending, which has begun with the other value.
            TypeError, ValueError: As in the constructor.
        """
        if self._engine.stage in (Stage.AFTER_FIRST_STEP, Stage.IN_PASS, Stage.BETWEEN_PASSES):
            raise out_of_order(f"optimizer.{name} = ...", self._engine.stage)
        if name == "model":
            value = one_module(value)
            check_model(value, self.base)
        if name == "per_rank" and value:
            self._check_per_rank()
        self._engine.take_options(**{option: getattr(self, option) for option in OPTIONS} | {name: value})
        return value

    def _check_per_rank(self) -> None:
        """Refuse ``per_rank=True`` with the rules of this optimizer."""
        check_per_rank(self.perturbation, self.cadence)

    @abstractmethod
    def passes(self, *, accumulate: bool = False, loss_weight: float | None = None) -> Iterator[Pass]:
        """Yield the passes of one step."""

    # The beginning of a step.

    def restore(self) -> None:
        """Abort a pending step and restore the weights; the next pass is a first one."""
        self._engine.abort()
        self._engine.stage = Stage.IDLE

    def _begin(self, caller: str) -> None:
        """Begin a step: check everything on which it depends."""
        if self._engine.stage in (Stage.AFTER_FIRST_STEP, Stage.IN_PASS):
            raise out_of_order(caller, self._engine.stage)
        check_unscaled(self._engine.unscaled_by, caller)
        self._engine.unscaled_by = None
        self.restore()  # an interrupt may have hit restore() itself
        self._follow_parameters()
        self._engine.load_from_base()
        check_groups(self.base)
        first_parameter = next(parameters_of(self.base))
        self._check_capture(first_parameter)
        self._engine.scale = self._loss_scale(first_parameter)
        self._check_passes()

    def _follow_parameters(self) -> None:
        """Adopt parameters that were added to the base's groups, or removed, past :meth:`add_param_group`.

        Otherwise new ones would count as parameters of another optimizer, whose gradients in the second pass are
        undone. Accelerate replaces them all in ``prepare()`` under FSDP2; rules that name parameters follow there.
        """
        replaced = self._engine.follow_parameters(self.model)
        followed = with_parameters(self.perturbation, replaced) if replaced else self.perturbation
        if followed is not self.perturbation:  # else it is that of a method which may refuse another one
            self.perturbation = followed

    def _begin_micro_batch(self, loss_weight: float | None, *, accumulate: bool, is_first: bool) -> None:
        """Begin a loop over the passes, which may be that of one of several micro-batches."""
        engine = self._engine
        if accumulate or loss_weight is not None:
            rules = (self.perturbation, self.combination, self.cadence)
            engine.micro_batches.check(rules, engine.zero_point, loss_weight)
        engine.micro_batches.begin(engine.memory, loss_weight, is_first=is_first)

    def _loss_scale(self, parameter: Tensor) -> Tensor | None:
        """Return the scale of the loss scaler, on the device of the parameter."""
        return loss_scale(self.scaler, parameter)

    def _check_passes(self) -> None:
        """Refuse a cadence that needs a gradient at w, if no pass makes one."""
        if self._has_single_pass() and needs_gradient(self.cadence):
            raise ValueError(
                f"{self.cadence} needs the gradient at w, but {self.perturbation} makes no pass at w: take a "
                "cadence that reads only the step's number, and declares needs_gradient = False"
            )
        if problem := check_subset(self.perturbation, parameters_of(self.base)):
            self._engine.warn_once("frozen subset", problem)

    # The passes, and the update gradient.

    def _has_single_pass(self) -> bool:
        """True if the step runs a single pass, at w + e."""
        return not needs_gradient(self.perturbation) and not self.combination.needs_unperturbed_gradient

    def _step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield the passes of one step, then write the update gradient to ``.grad``."""
        self._engine.pass_gradients.begin_step(accumulate=accumulate)
        yield from self._single_pass() if self._has_single_pass() else self._passes_from_w()
        self._combine()
        if before := self._engine.gradients.before_loop:
            self._engine.gradients.accumulate(before)

    def _single_pass(self) -> Iterator[Pass]:
        point = self._engine.point_before_passes()
        if not self.cadence(point):
            yield self._pass_at_w(is_last=True)
        else:
            begin = partial(self._begin_perturbed_pass, point, single_pass=True)
            yield Pass(self._engine, begin, is_first=True, is_last=True, is_perturbed=True)

    def _passes_from_w(self) -> Iterator[Pass]:
        """Yield a pass at w, and one after each ascent step."""
        planned = None if needs_gradient(self.cadence) else self.cadence(self._engine.point_of_step())
        yield self._pass_at_w(is_last=None if planned is None else not planned)
        point: Point | None = self._engine.point_after_first_pass()
        if planned is None and point is not None:
            planned = self.cadence(self._engine.unscaled_view(self.cadence, point))
        for left in reversed(range(ascent_steps(self.perturbation) if planned else 0)):
            begin = partial(self._begin_perturbed_pass, point or self._engine.point_after_ascent_step())
            sam_pass = Pass(self._engine, begin, is_first=False, is_last=left == 0, is_perturbed=True)
            point = begin = None  # type: ignore[assignment]  # or they keep the first gradient through the second pass
            yield sam_pass

    def _pass_at_w(self, *, is_last: bool | None) -> Pass:
        begin = self._engine.side_effects.begin_first_pass
        return Pass(self._engine, begin, is_first=True, is_last=is_last, is_perturbed=False, is_at_w=True)

    def _begin_perturbed_pass(self, point: Point, *, single_pass: bool = False) -> None:
        keep_unperturbed = self.combination.needs_unperturbed_gradient
        self._engine.begin_perturbed_pass(
            point, self.perturbation, keep_unperturbed=keep_unperturbed, single_pass=single_pass
        )

    def _combine(self) -> None:
        """Write the update gradient to ``.grad``."""
        self._engine.combine(self.combination)

    def _finish_classic(self) -> None:
        """Restore the weights and write the update gradient, after the second backward of the classic API."""
        self._engine.restore()
        self._combine()

    # The end of a step.

    def _step_by(self, closure: Closure) -> Any:
        """Run the passes by a closure and step, through the loss scaler if there is one."""
        refuse_closure_of_scaler()
        check_closure(closure)
        try:
            loss = self._run(closure)
            if self._engine.scale is None or self.scaler is None:
                self._check_gradients()
                self._take_step()
            else:
                self._scaler_target.param_groups = self.param_groups
                self.scaler.step(self._scaler_target)  # type: ignore[arg-type]
                self._engine.stage = Stage.IDLE
                self._engine.gradients.mark_left()  # also if the scaler has skipped the step
        except BaseException:
            self._scaler_target = ScalerTarget(self._take_step)  # the scaler may have unscaled for the old one only
            self.restore()
            raise
        return loss

    def _run(self, closure: Closure) -> Any:
        """Call the closure once a pass; return the loss of the first."""
        return run_closure(closure, self.passes(), self._engine, partial(backward, scaler=self.scaler))

    def _take_step(self) -> None:
        """Step from w with the gradient in ``.grad``."""
        self._engine.side_effects.end_step()
        self._engine.stage = Stage.IDLE
        self._step_base()
        self._engine.count_step()

    def _check_scale(self) -> None:
        """Refuse a step with gradients that are scaled, or that a rule has got times an unknown scale."""
        # in the classic API, scaler.unscale_() has reached g_s only
        only_one_unscaled = self._engine.stage is Stage.AFTER_FIRST_STEP and self.combination.needs_unperturbed_gradient
        rules = (self.perturbation, self.combination, self.cadence)
        check_scale(self._engine.scale, rules, self.combination if only_one_unscaled else None)

    def _check_gradients(self) -> None:
        """Refuse a backward after the passes, and warn once if there was none.

        Raises:
            RuntimeError: The passes made no gradient, and now there is one.
        """
        engine = self._engine
        if engine.stage is Stage.READY and not engine.pass_gradients.any and engine.gradients.any():
            raise RuntimeError(BACKWARD_OUTSIDE)
        if problem := engine.pass_gradients.problem():
            if not holds_any(self.model, self.base):
                problem = (
                    "the parameters of model= are no longer those of the optimizer, so nothing was trained: they were "
                    "replaced, as load_state_dict(assign=True) does, and to_empty() of a model on the meta device. "
                    "Make the optimizer after it"
                )
            engine.warn_once("no gradient", problem)

    def _check_cleared(self) -> None:
        """Warn once if the second backward of the classic API has added to the first gradient; in the first step."""
        self._engine.clearing_watched = True
        if self._engine.gradients.were_added_to():
            self._engine.warn_once(
                "not cleared",
                "the second backward has added to the gradient g of the first one, so the update is g + g_s, and only "
                "half of it is SAM's. Call first_step(zero_grad=True), or zero_grad() between first_step() and the "
                "second backward",
            )

    def _refuse_unreduced_gradients(self) -> None:
        """Abort the step if FSDP2 has not reduced the gradients of the second backward of the classic API.

        Raises:
            RuntimeError: It has not.
        """
        try:
            self._engine.ranks.refuse_unreduced_gradients()
        except RuntimeError:
            self.restore()
            raise

    def _warn_of_lost_gradient(self) -> None:
        """Warn once if the update gradient of earlier passes is about to be lost without a step."""
        engine = self._engine
        if engine.micro_batches.left_out:
            return  # one of its micro-batches has failed, and the whole batch is given up
        if engine.stage is Stage.READY and engine.pass_gradients.any and not engine.has_warned("lost gradient"):
            size = norm(engine.gradients.parameters_and_gradients()[1])
            if 0.0 < float(size) < math.inf:  # after an overflow, a loss scaler takes no step
                engine.warn_once(
                    "lost gradient",
                    "passes() was called again before step(), so the update gradient of the passes before is lost. To "
                    "accumulate over micro-batches, run all of them inside each pass; or give each its own "
                    "perturbation, passes(accumulate=True) for all but the first. To discard a gradient, call "
                    "zero_grad()",
                )

    def _step_base(self) -> bool:
        """Step the base unless a gradient is not finite; return False if the host skipped the step."""
        return self._engine.gradients.step_if_finite()

    def _plain_step(self) -> Any:
        """Step the base without passes, with a warning the first time."""
        if all(group.get("lr", 1.0) == 0.0 for group in self.param_groups):
            # torch.distributed.checkpoint: a step with lr = 0 makes a state, whose names and shapes it then reads. Also
            # under the Trainer, which loads checkpoints of FSDP2 in this way; a plain one raises as soon as lr > 0.
            self._memory_template = self._make_memory_template()
        elif called_by_trainer():
            raise RuntimeError(
                "transformers.Trainer steps after one backward and gives no closure, so SAM would be silently off: use "
                "steppe.integrations.transformers.SAMTrainer, or its SAMTrainerMixin before a Trainer of your own"
            )
        else:
            self._engine.warn_once(
                "plain step",
                "step() was called without a closure and without passes before it: this is a plain step of "
                f"{names_of(self.base)}, without sharpness-aware minimization. Give step() a closure, or run "
                "the forward and backward in `for sam_pass in optimizer.passes(): with sam_pass: ...`",
            )
        return self.base.step()

    def _make_memory_template(self) -> Memory:
        """Return the rules' memory filled with zeros: the names and shapes in a later checkpoint."""
        return self._engine.memory_template(self.perturbation, self.combination, self.cadence)
