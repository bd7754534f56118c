"""What the three ways to drive a step share: its beginning, its end, and the run of a closure."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

from steppe._engine.closure import run_closure
from steppe._engine.constructor import check_groups
from steppe._engine.loss_scale import ScalerTarget, refuse_closure_of_scaler
from steppe._engine.losses import backward
from steppe._engine.passes import Pass
from steppe._engine.stage import Stage, out_of_order
from steppe._engine.state_dict import holds_sam_state, parameters_of
from steppe._engine.step import SAMStep

Closure: TypeAlias = Callable[[], Any]


class Drive(SAMStep):
    """The part of :class:`steppe.SAM` between its public methods and the parts of a step."""

    _scaler_target: ScalerTarget

    @abstractmethod
    def passes(self, *, accumulate: bool = False, loss_weight: float | None = None) -> Iterator[Pass]:
        """Yield the passes of one step."""

    def restore(self) -> None:
        """Abort a pending step and restore the weights; the next pass is a first one."""
        self._engine.abort()
        self._engine.stage = Stage.IDLE

    def _begin(self, caller: str) -> None:
        """Check everything that a step depends on; called at the start of each step."""
        if self._engine.stage in (Stage.AFTER_FIRST_STEP, Stage.IN_PASS):
            raise out_of_order(caller, self._engine.stage)
        self.restore()  # an interrupt may have hit restore() itself
        if holds_sam_state(self.base):  # a checkpoint of SAM was loaded into the base
            self._engine.load_from_base()
        check_groups(self.base)
        anywhere = next(parameters_of(self.base))
        self._check_capture(anywhere)
        self._engine.scale = self._loss_scale(anywhere)
        self._check_passes()

    def _step_by(self, closure: Closure) -> Any:
        """Run the passes by a closure and step, through the loss scaler if there is one."""
        refuse_closure_of_scaler()
        try:
            loss = self._run(closure)
            if self._engine.scale is None or self.scaler is None:
                self._check_gradients()
                self._take_step()
            else:
                self._scaler_target.param_groups = self.param_groups
                self.scaler.step(self._scaler_target)  # type: ignore[arg-type]
                self._engine.stage = Stage.IDLE
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
