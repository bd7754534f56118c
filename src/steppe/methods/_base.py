"""What these methods share: hyperparameters of their own, and a pass at a point of their own."""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self

from torch import Tensor

from steppe._engine.callers import called_by_scaler
from steppe.rules import Memory
from steppe.sam import SAM, Pass


class Method(SAM):
    """A :class:`steppe.SAM` with hyperparameters, and perhaps refusals, of its own."""

    _own: ClassVar[tuple[str, ...]] = ()
    """The hyperparameters that a copy keeps, beyond those of SAM."""
    _no_scaler: ClassVar[str] = ""
    """Why no loss scaler can unscale this method's gradients; empty where one can."""

    def __init__(self, *args: Any, per_rank: bool = False, **kwargs: Any) -> None:
        if per_rank:
            raise ValueError(
                f"per_rank=True with {type(self).__name__}, whose passes are its own: leave it out, and all ranks "
                "climb together, as one process would"
            )
        super().__init__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._own}}

    def _empty_memory(self) -> Memory:
        return {}

    def _refuse(self, what: str, why: str) -> NoReturn:
        raise RuntimeError(f"{what} with {type(self).__name__}: {why}")

    # Loss scalers, where a method cannot work with one.

    def _loss_scale(self) -> Tensor | None:
        scale = super()._loss_scale()
        if scale is not None:
            self._refuse_scaler()
        return scale

    def _check_scale(self) -> None:
        if called_by_scaler():
            self._refuse_scaler()
        super()._check_scale()

    def _refuse_scaler(self) -> None:
        if self._no_scaler:
            why = f"{self._no_scaler}. Train in bfloat16, which needs no scaler, or in float32"
            self._refuse("scaler.step(optimizer)", why)


class PassAtPoint(Pass):
    """A step's ordinary pass, as buffers and generators see it, but at another point than w."""

    def __init__(self, optimizer: SAM, move: Callable[[], None], *, is_last: bool) -> None:
        super().__init__(optimizer, is_last=is_last)
        self._move = move

    def __enter__(self) -> Self:
        try:
            if not self.done:
                self._move()
                self._optimizer._engine.moved()
            return super().__enter__()
        except BaseException:
            self._optimizer._engine.restore()
            raise
