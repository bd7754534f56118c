"""Find the samples that raise an error in the midst of a run, such as one with a label out of range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.batches import Batch
from steppe.experiments.tasks.samples import RandomStream, Samples
from steppe.experiments.tasks.task import Task
from steppe.flatness._batches import list_tensors, map_tensors

_NAMED = 5


class _Named(str):
    """A note of an error, about the samples that raise it; other notes are not ours."""


@contextmanager
def naming_samples(task: Task, model: nn.Module, samples: Samples, batch: Batch) -> Iterator[None]:
    """Add the samples of a batch that raise an error to it, for `samples_of`."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        # after an error of CUDA, every computation raises it
        if "CUDA" not in str(error) and (found := _found(task, model, samples, batch, error)):
            error.add_note(_Named(found))
        raise


def samples_of(error: BaseException) -> str:
    """Return the end of a sentence about an error: the samples that raise it, if they were found."""
    return next((f", with {note}" for note in getattr(error, "__notes__", ()) if isinstance(note, _Named)), "")


def _found(task: Task, model: nn.Module, samples: Samples, batch: Batch, error: Exception) -> str:
    """Return which samples raise the error; nothing if it is not the data's, but the optimizer's."""
    if samples.sizes is not None:
        number = torch.tensor(samples.sizes).cumsum(0).gt(int(batch.indices[0])).int().argmax()
        return f"batch {int(number)} of {samples.name}, counted from 0"
    was_training = model.training
    model.eval()  # BatchNorm takes no single sample for training
    try:
        with torch.no_grad(), RandomStream(0, 0, 0).active():
            positions = [i for i in range(len(batch)) if _sample_raises(task, model, batch, i, type(error))]
            if not positions and not _raises(task, model, batch.data, type(error)):
                return ""
    finally:
        model.train(was_training)
    if len(positions) == len(batch):  # no sample is special
        positions = []
    found = batch.indices[positions] if positions else batch.indices
    found = found.cpu() if samples.origin is None else samples.origin[found.cpu()]
    listed = ", ".join(map(str, found[:_NAMED].tolist())) + (", ..." if len(found) > _NAMED else "")
    what = "sample" if len(found) == 1 else "samples" if positions else "the batch of samples"
    return f"{what} {listed} of {samples.name}, counted from 0"


def _sample_raises(task: Task, model: nn.Module, batch: Batch, i: int, error: type[Exception]) -> bool:
    """True if a single sample of a batch raises an error of a type as well."""
    data: Any = batch.data
    if any(tensor.dim() == 0 or len(tensor) != len(batch) for tensor in list_tensors(data)):
        return False

    def one(tensor: Tensor) -> Tensor:
        return tensor[i : i + 1]

    return _raises(task, model, map_tensors(data, one), error)


def _raises(task: Task, model: nn.Module, data: Any, error: type[Exception]) -> bool:
    try:
        task.evaluate(model, data)
    except Exception as raised:
        return type(raised) is error
    return False
