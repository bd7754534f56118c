"""The wrapper of a :class:`steppe.SAM` that Lightning's loops and ``self.optimizers()`` get."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import proxy

import torch
from torch.optim import Optimizer

from steppe.integrations._lightning_package import pl
from steppe.integrations._lightning_window import AccumulationWindow
from steppe.integrations._module_attributes import PlainAttributes
from steppe.sam import SAM, Pass, Stage


class SAMLightningOptimizer(pl.core.optimizer.LightningOptimizer):
    """Run the passes of a SAM so that Lightning counts, unscales and clips once a step.

    Args:
        sam: The optimizer.
        trainer: The Trainer that fits the module.
        window: The micro-batches of a step in automatic optimization; None in manual optimization.
    """

    def __init__(self, sam: SAM, trainer: "pl.Trainer", window: AccumulationWindow | None) -> None:
        super().__init__(sam)
        self._strategy = proxy(trainer.strategy)  # as LightningOptimizer.step() expects
        self._sam, self._trainer, self.window = sam, trainer, window
        self._attributes = PlainAttributes(trainer.lightning_module)

    # Lightning makes the class of this object a subclass of SAM's, so that isinstance(opt, SAM) holds. SAM's methods
    # that write attributes would then write those of this object; so the overrides below call those of the SAM itself.

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._sam.__reduce_ex__(protocol)  # a copy is a SAM without the Trainer

    def passes(self, *, accumulate: bool = False, loss_weight: float | None = None) -> Iterator[Pass]:
        for sam_pass in self._sam.passes(accumulate=accumulate, loss_weight=loss_weight):
            yield sam_pass if sam_pass.is_first else sam_pass.around(self._muted())

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._sam.zero_grad(set_to_none)

    def restore(self) -> None:
        self._sam.restore()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sam.load_state_dict(state_dict)

    def first_step(self, zero_grad: bool = False) -> None:
        raise RuntimeError(
            "first_step() does not work in Lightning: the classic API bypasses Lightning's step counter and loss "
            "scaling. Write `for sam_pass in opt.passes(): with sam_pass: ...` and opt.step(), or opt.step(closure)"
        )

    def second_step(self, zero_grad: bool = False) -> None:
        self.first_step()

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        sam, loss = self._sam, None
        if closure is None and sam._engine.stage is not Stage.READY:
            raise RuntimeError(
                "step() was called without a closure and without passes before it: this would be a plain step of "
                f"{type(sam.base).__name__}, without sharpness-aware minimization. Run forward and manual_backward in "
                "`for sam_pass in opt.passes(): with sam_pass: ...`, or call opt.step(closure); leave an optimizer "
                "that is not for SAM out with SAMCallback(optimizers=[...])"
            )

        def all_passes() -> Any:
            nonlocal loss
            assert closure is not None
            loss = self._run_passes(closure)
            return loss

        handle = sam.register_step_pre_hook(_run_closure_before_step)
        try:
            super().step(None if closure is None else all_passes, **kwargs)
        finally:
            handle.remove()
        sam.restore()  # after an overflow the loss scaler has not called SAM's step, so its passes are still pending
        return loss

    def _run_passes(self, closure: Callable[[], Any]) -> Any:
        """Run all passes of a step; return the loss of the first."""
        gradients, window = self._sam._engine.gradients, self.window
        earlier = gradients.accumulated_earlier()
        has_earlier = window is not None and window.has_earlier()
        loss = None
        for sam_pass in self.passes():
            with sam_pass, torch.enable_grad():
                if not sam_pass.is_first:
                    closure() if window is None else window.repeat_all(sam_pass)
                    continue
                if window is not None and has_earlier and not sam_pass.is_at_w:
                    with self._muted():  # `earlier` has gradients at w, and this pass is at w + e
                        window.repeat_earlier()
                else:
                    gradients.replace(earlier)
                loss = closure()
                if window is not None:
                    window.end_first_pass(sam_pass)
                if not has_earlier:
                    gradients.refuse_if_kept(earlier)
        if window is not None:
            window.clear()
        return loss

    @contextmanager
    def _muted(self) -> Iterator[None]:
        """Mute logs and callbacks, and restore plain attributes at the end."""
        trainer, attributes = self._trainer, self._attributes
        attributes.save()
        # Lightning calls the hooks of all callbacks in this list, and modules call self.log; without these two lines
        # each further pass would be counted and logged as a step of its own.
        callbacks, trainer.callbacks = trainer.callbacks, []  # type: ignore[attr-defined]
        for module in trainer.lightning_module.modules():
            if isinstance(module, pl.LightningModule):
                vars(module)["log"] = _ignore_log
        try:
            yield
        finally:
            attributes.restore()  # removes "log" too, which was not there when the attributes were saved
            trainer.callbacks = callbacks  # type: ignore[attr-defined]


def _run_closure_before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Run Lightning's closure before the step, and hide it from SAM.

    The closure runs the passes, then Lightning's hooks and clipping. SAM would call it once a pass.
    """
    if (closure := kwargs.pop("closure", None)) is not None:
        closure()
    return args, kwargs


def _ignore_log(*args: Any, **kwargs: Any) -> None:
    pass
