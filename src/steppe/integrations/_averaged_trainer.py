"""Averaged weights in the Hugging Face Trainer, with or without SAM."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from steppe.averaging import Average, from_name

if TYPE_CHECKING:
    _Trainer = Trainer
else:  # at run time the Trainer is the class that follows in the method resolution order
    _Trainer = object

_FILE = "averaged.pt"


class AveragedTrainerMixin(_Trainer):
    """Averaged weights in any Trainer: put it first, ``class Mine(AveragedTrainerMixin, SAMTrainer)``.

    The average is updated after each completed step. ``evaluate`` and ``predict`` run with the averaged weights, and so
    choose the best checkpoint by them. Each checkpoint has the average in a file of its own, ``averaged.pt``, beside
    the weights w, with which training resumes.

    After ``train()`` the model has the weights w. To save the averaged ones::

        with trainer.averaged.applied():
            trainer.save_model("averaged")

    Args:
        *args: Positional arguments of the Trainer.
        average: The name of an average, ``"ema"`` or ``"swa"`` (the mean over the last quarter of the steps); or a
            function of model and optimizer that returns one, such as ``functools.partial(EMA, decay=0.99)``.
        **kwargs: Keyword arguments of the Trainer.

    Attributes:
        averaged: The :class:`steppe.averaging.Average` of the last ``train()``; None before.

    Example:
        >>> class AveragedTrainer(AveragedTrainerMixin, Trainer): ...
        >>> trainer = AveragedTrainer(model=model, args=args, train_dataset=data, average="ema")  # doctest: +SKIP
    """

    averaged: Average | None = None

    def __init__(
        self, *args: Any, average: str | Callable[[nn.Module, Optimizer], Average] = "ema", **kwargs: Any
    ) -> None:
        self._average = average
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule, and the average: from here on, the optimizer does not change."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        assert self.model is not None
        assert self.optimizer is not None
        if isinstance(self._average, str):
            self.averaged = from_name(self._average, self.model, self.optimizer, total_steps=num_training_steps)
        else:
            self.averaged = self._average(self.model, self.optimizer)
        return scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the averaged weights."""
        with self._average_applied():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with the averaged weights."""
        with self._average_applied():
            return super().predict(*args, **kwargs)

    def _average_applied(self) -> AbstractContextManager[Any]:
        # The Trainer calls evaluate() again for each of several data sets.
        if self.averaged is None or self.averaged.is_applied:
            return contextlib.nullcontext()
        return self.averaged.applied()

    # Private methods of the Trainer: it has no public ones for a further file in a checkpoint.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.averaged is not None and self.args.should_save:
            torch.save(self.averaged.state_dict(), Path(output_dir) / _FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_average(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str | None) -> None:
        if self.averaged is not None and checkpoint is not None and (path := Path(checkpoint) / _FILE).is_file():
            self.averaged.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
