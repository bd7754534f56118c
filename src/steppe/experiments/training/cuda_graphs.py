"""Training steps as CUDA graphs: the kernels of each kind of step are recorded once and then replayed.

A replay runs the work of the device and none of the Python code, whose counters are updated here instead. A run with
graphs takes the same steps as one without, the first few of them without a graph.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe import SAM
from steppe.experiments.config.recipe import Run
from steppe.experiments.config.sections import TrainingConfig
from steppe.experiments.errors import ExperimentError, first_line
from steppe.experiments.tasks.batches import Batch
from steppe.experiments.tasks.samples import Samples, TensorSamples
from steppe.experiments.world import World

T = TypeVar("T")
_Kind = tuple[int, bool | None]
"""The samples of a batch, and whether the step perturbs the weights: steps of one kind launch the same kernels."""

# Steps before a recording, in which everything is allocated, compiled and chosen that is so once.
_WARM_UP = 3


class Step(NamedTuple):
    """The result of a step: the loss at w, a tensor that the next step may overwrite, and the cost."""

    loss: Tensor
    cost: Fraction
    """Gradient evaluations."""


class Recorder:
    """Records CUDA graphs, in one pool of memory: one runs at a time, and none needs the content left by another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], T]) -> T:
        """Do some work without a recording, on the stream of the recordings: libraries keep workspaces by stream."""
        around = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            result = work()
        around.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Run the Python code of some work and record its kernels without running them.

        Returns the result of the work, and the replay, which writes to its tensors.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = work()
        return result, graph.replay


RECORDERS = {"cuda": Recorder}
"""The recorder of each type of device."""


def recorder(run: Run, world: World, train: Samples) -> Recorder | None:
    """Make the recorder of a run's steps on its training data; None if they are taken without graphs."""
    recipe = run.recipe
    if recipe.hardware.cuda_graphs is False or not run.method.definition.capturable or world.size > 1:
        return None
    # a graph reads the data by their positions, and keeps the learning rate and the number of micro-batches
    if not isinstance(train, TensorSamples) or _has_course(recipe.training) or recipe.data.task or run.method.average:
        return None
    # a published checkpoint may have dropout, and the passes of a recorded step cannot draw the same numbers
    if recipe.model.backbone not in ("none", "own"):
        return None
    make = RECORDERS.get(world.device.type)
    return None if make is None else make(world.device)


def _has_course(training: TrainingConfig) -> bool:
    """True if the learning rate changes, or the gradients are changed by code that a graph would not contain."""
    return training.schedule != "constant" or training.warmup > 0 or training.clip is not None


class _Graph(NamedTuple):
    """A step of one kind."""

    indices: Tensor
    """The tensor from which it reads the positions of its samples; its only input."""
    step: Step
    replay: Callable[[], None]


class Stepper:
    """Takes steps by `take`; with a recorder, only the first few of each kind, and the others by a replay."""

    def __init__(self, take: Callable[[Batch], Step], optimizer: Optimizer, recorder: Recorder | None) -> None:
        self._take, self._recorder = take, recorder
        # other optimizers keep their state in tensors; SAM counts its steps and calls its cadence in Python
        self._sam = optimizer if isinstance(optimizer, SAM) else None
        self.reset()

    def reset(self) -> None:
        """Drop the graphs: they work on the tensors of their recording."""
        self._warmed_up, self._graphs = Counter[_Kind](), dict[_Kind, _Graph]()

    def __call__(self, batch: Batch) -> Step:
        """Take one step; ExperimentError if it cannot be recorded."""
        if self._recorder is None:
            return self._take(batch)
        kind = len(batch), None if self._sam is None else self._sam.perturbs_next
        graph = self._graphs.get(kind)
        if graph is not None:
            if self._sam is not None:
                self._sam.replayed()
        elif self._warmed_up[kind] < _WARM_UP:
            self._warmed_up[kind] += 1
            return self._recorder.warm(lambda: self._take(batch))
        else:
            graph = self._graphs[kind] = self._record(batch, self._recorder)  # its Python has counted this step
        graph.indices.copy_(batch.indices)
        graph.replay()
        return graph.step

    def _record(self, batch: Batch, recorder: Recorder) -> _Graph:
        indices = batch.indices.clone()
        try:
            with nullcontext() if self._sam is None else self._sam.recording():
                step, replay = recorder.record(lambda: self._take(replace(batch, indices=indices)))
        except RuntimeError as error:
            raise ExperimentError(
                f"the training step could not be captured as a CUDA graph ({first_line(error)}): use --no-cuda-graphs, "
                "with which each step is launched anew"
            ) from error
        return _Graph(indices, step, replay)
