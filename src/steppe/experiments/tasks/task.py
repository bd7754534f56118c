"""A task: the model, the data, the loss and the metrics that methods are compared on."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.weak import WeakIdKeyDictionary

from steppe.experiments.config.task_info import MetricInfo, TaskInfo
from steppe.experiments.errors import ExperimentError, closest, unknown
from steppe.experiments.tasks.samples import RandomStream, Samples, as_samples
from steppe.flatness._model_loss import logits_in

T = TypeVar("T")

_BATCH_SIZE = 64
_LABELS = ("labels", "label", "targets", "target")

_trained = WeakIdKeyDictionary()
"""What training changes, of all models that tasks have made in this process."""


def _with_suggestions(made: type[T]) -> type[T]:
    """Let the constructor of a dataclass name the closest argument in the place of one that there is not."""
    constructor, names = made.__init__, [one.name for one in fields(cast(Any, made)) if one.init]

    @functools.wraps(constructor)  # its signature as well
    def with_suggestions(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                raise TypeError(f"{made.__name__}() has no argument {name!r}{closest(name, names)}")
        constructor(self, *args, **kwargs)

    made.__init__ = with_suggestions  # type: ignore[assignment, method-assign]
    return made


@_with_suggestions
@dataclass(frozen=True)
class Metric:
    """A measure of a split: a function of all outputs and targets, in the order of the samples.

    Where they are of others than the samples, as of the tokens of texts, they come batch by batch, and the batches of
    an evaluation are spread over the split.
    """

    function: Callable[[Any, Any], Any]
    """(outputs, targets) -> a number; both are on the CPU, concatenated over the whole split."""
    higher_is_better: bool = True
    unit: str = ""
    """Written beside the values in tables and figures, for example "%"."""


@_with_suggestions
@dataclass(frozen=True, eq=False)
class Task:
    """What methods are compared on: a model, data, a loss, metrics, an optimizer and a schedule.

    All functions are called in the process that trains. A run is seeded before `model` is called, and so is each batch
    before its items are read, so that all methods of a seed have the same initial weights and the same batches.

    Args:
        model: Function that returns a new model.
        train: The training data: a tuple of tensors (inputs, targets), a Dataset, a DataLoader, other batches that can
            be iterated over many times, or a function of the seed that returns one of these. NumPy arrays in the tuple
            become tensors, and those of float64 tensors of torch's default type, float32. Of a DataLoader, the
            dataset, the batch size, the collate function and the workers are used; the order is shuffled by the run's
            seed if the loader shuffles. A loader with a sampler of its own is used as it is.
        test: The test data, in the same forms. They are read in evaluation mode, without a shuffle.
        optimizer: Function of the model that returns the base optimizer, any of torch's.
        loss: Function (outputs, targets) -> mean loss of a batch, a 0-dim tensor. By default the model's own: its
            outputs have a `loss`, as those of Hugging Face models do.
        predict: Function (model, batch) -> (outputs, targets). By default, a batch is a tuple (inputs, targets), or
            (input, input, ..., targets) for a model of several inputs, or a mapping that is passed to the model by its
            keys; of a mapping, the targets are its "labels".
        metrics: Functions (outputs, targets) -> number, or :class:`Metric` where lower is better or a unit is to be
            shown, by their names. The first one decides the comparison; without any, the loss does.
        validation: Held-out data, on which the best moment of a run is chosen and `steppe tune` judges. By default,
            tuning holds out a part of the training data.
        schedule: "constant", "cosine", "linear" or "one-cycle" over the planned steps, or a function
            (optimizer, total_steps) -> scheduler of torch. By default, the command's option decides.
        batch_size: Samples in a step; by default the loader's, or 64.
        evaluation_batch_size: Samples in a batch of an evaluation; by default that of the test data's loader, or
            `batch_size`.
        classes: The number of classes; needed by methods that store outputs (`saf`) only.
        name: The title of tables and figures.
        final_measures: Function (model, raise_if_stopped) -> {name: number} of further measures of the trained model,
            in evaluation mode and without gradients. It may call `raise_if_stopped` often, so that a signal stops it.
        then: A second task, for forgetting: a copy of each trained model is trained on its training data and loss with
            the base alone, and measured by the metrics above on the test data of both tasks.

    Example:
        >>> from steppe.experiments import accuracy
        >>> inputs, targets = torch.randn(64, 5), torch.randint(3, (64,))
        >>> task = Task(
        ...     model=lambda: nn.Linear(5, 3),
        ...     train=(inputs[:48], targets[:48]),
        ...     test=(inputs[48:], targets[48:]),
        ...     optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        ...     loss=F.cross_entropy,
        ...     metrics={"accuracy": accuracy},
        ... )
        >>> list(task.metrics)
        ['accuracy']
    """

    model: Callable[[], nn.Module]
    train: Any
    test: Any
    optimizer: Callable[[nn.Module], Optimizer]
    loss: Callable[[Any, Any], Tensor] | None = None
    predict: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None
    metrics: Mapping[str, Callable[[Any, Any], Any] | Metric] = field(default_factory=dict)
    validation: Any = None
    schedule: str | Callable[[Optimizer, int], LRScheduler] | None = None
    batch_size: int | None = None
    evaluation_batch_size: int | None = None
    classes: int | None = None
    name: str = "task"
    final_measures: Callable[[nn.Module, Callable[[], None]], Mapping[str, float]] | None = None
    then: Task | None = None
    initial_weights: str | None = None
    """A digest of pretrained weights that every run starts from: a run is resumed only if it is the same."""
    entry_point: str | None = None
    """The name by which other processes can import the task, package.module:name."""
    counted: list[tuple[Any, int, list[int]]] = field(default_factory=list, repr=False)
    """Data whose batches have been read to count them, with the seed and the sizes: they are counted once a command.

    It is here because copies of the task share it, and a pickled task takes it along. A process that imports the task
    by its name counts once more.
    """

    def __post_init__(self) -> None:
        for name in ("model", "optimizer"):
            if not callable(getattr(self, name)) or isinstance(getattr(self, name), nn.Module | Optimizer):
                raise TypeError(
                    f"{name} is {type(getattr(self, name)).__name__}: every run needs one of its own, so give a "
                    f"function that makes it, for example {name}={_EXAMPLES[name]}"
                )
        if isinstance(self.loss, type) or not (self.loss is None or callable(self.loss)):
            raise TypeError(
                f"loss is {describe_type(self.loss)}: give a function (outputs, targets) -> mean loss, for example "
                "loss=torch.nn.functional.cross_entropy or loss=torch.nn.CrossEntropyLoss()"
            )
        if not isinstance(self.metrics, Mapping):
            raise TypeError(
                f"metrics is {describe_type(self.metrics)}: give functions (outputs, targets) -> number by their "
                'names, for example metrics={"accuracy": accuracy}'
            )
        for name, metric in self.all_metrics().items():
            if not callable(metric.function):
                raise TypeError(
                    f"the metric {name!r} is {describe_type(metric.function)}, and a function (outputs, targets) -> "
                    "number is needed"
                )
        if isinstance(self.schedule, str) and self.schedule not in _SCHEDULES:
            raise ValueError(unknown("schedule", self.schedule, _SCHEDULES))
        for name in ("batch_size", "evaluation_batch_size"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, Integral) or size < 1):
                raise ValueError(f"{name}={size!r}: it is a number of samples, at least 1")
        if "loss" in self.metrics or not all(str(name).strip() == name != "" for name in self.metrics):
            raise ValueError(
                f"metrics={list(self.metrics)}: each needs a name, without spaces at its ends, and not 'loss', which "
                "is measured anyway"
            )

    def new_model(self) -> nn.Module:
        """Return a new model for a run.

        Raises:
            ExperimentError: It has weights, or statistics of normalization layers, of an earlier model.
        """
        model = self.model()
        if not isinstance(model, nn.Module):
            raise ExperimentError(f"the task's model= returned {describe(model)}, and a torch.nn.Module is needed")
        weights: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        layers = [(f"{name}.running_mean", layer) for name, layer in model.named_modules()]
        weights |= {name: layer.running_mean for name, layer in layers if _tracks(layer)}
        if shared := [name for name, tensor in weights.items() if tensor in _trained]:
            raise ExperimentError(
                f"the task's model= returned a model whose {shared[0]} is that of an earlier one: each run would go on "
                "from the weights of the last one, whatever its method and its seed. Make all of the model in the "
                "function, for example model=lambda: Net(), or model=lambda: copy.deepcopy(net) to start from "
                "pretrained weights"
            )
        _trained.update(dict.fromkeys(weights.values()))
        return model

    def samples(self, split: str, seed: int = 0) -> Samples:
        """Return the samples of "train", "test" or "validation" for a seed."""
        given = source = getattr(self, split)
        drawn_by = 0
        if callable(given) and not isinstance(given, Samples | nn.Module) and not hasattr(given, "__getitem__"):
            try:
                takes_seed = bool(inspect.signature(given).parameters)
            except ValueError:  # a built-in function
                takes_seed = True
            with RandomStream(seed, 0, 0).active():  # every process and every method draws the same
                given = given(seed) if takes_seed else given()
            drawn_by = seed
        known = next((sizes for data, by, sizes in self.counted if data is source and by == drawn_by), None)
        samples = copy.copy(as_samples(given, split, known))  # an object of samples may be that of several splits
        if samples.origin is None:  # samples that are held out of the training data are named by their places there
            samples.name = split
        if known is None and samples.sizes is not None:
            self.counted.append((source, drawn_by, samples.sizes))
        return samples

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are measured."""
        return ("train", "test") if self.validation is None else ("train", "validation", "test")

    def usual_batch_size(self, train: Samples) -> int:
        """Return the number of samples in a step, where the recipe leaves it open."""
        return self.batch_size or train.batch_size or _BATCH_SIZE

    @property
    def info(self) -> TaskInfo:
        """What a folder keeps of the task."""
        metrics = (MetricInfo(name, m.higher_is_better, m.unit) for name, m in self.all_metrics().items())
        return TaskInfo(self.name, tuple(metrics))

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """Return the outputs of the model on a batch, and its targets."""
        return (self.predict or predict)(model, batch)

    def evaluate(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a model on a batch."""
        return self.mean_loss(*self.outputs(model, batch))

    def loss_and_outputs(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """Return the mean loss of a model on a batch, and the outputs that it is computed from."""
        outputs, targets = self.outputs(model, batch)
        used = logits_in(outputs) if self.loss is None else logits_of(outputs)
        return self.mean_loss(outputs, targets), used

    def for_metrics(self, outputs: Any) -> Any:
        """Return what the metrics get of the outputs: the logits of a model that returns its loss beside them, too."""
        if self.loss is None and isinstance(outputs, Mapping):
            return outputs.get("logits", outputs)
        return logits_of(outputs)

    def mean_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return _own_loss(outputs) if self.loss is None else self.loss(logits_of(outputs), targets)

    def total_loss(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        """Return the sum of the losses of a batch."""
        if self.loss is F.cross_entropy and targets.dim() == 1:
            summed: Tensor = cast(Any, F.cross_entropy)(logits_of(outputs), targets, reduction="sum")
            return summed
        return self.mean_loss(outputs, targets) * samples

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of each sample, (n,)."""
        if self.loss is None:
            raise ExperimentError(
                "the model computes its loss itself, as the mean of a batch, and this method needs that of each "
                "sample: give the task a loss=, (outputs, targets) -> mean loss"
            )
        outputs = logits_of(outputs)
        each: Tensor | None = None
        if isinstance(self.loss, nn.Module) and isinstance(getattr(self.loss, "reduction", None), str):
            loss = copy.copy(self.loss)
            loss.reduction = "none"  # type: ignore[assignment]
            each = loss(outputs, targets)
        elif "reduction" in _parameters(self.loss):
            each = cast(Any, self.loss)(outputs, targets, reduction="none")
        if each is not None:
            return each.flatten(1).mean(1) if each.dim() > 1 else each
        rows = range(len(targets))
        return torch.stack([self.loss(outputs[i : i + 1], targets[i : i + 1]) for i in rows])

    def all_metrics(self) -> dict[str, Metric]:
        """Return the metrics by name, each with its direction."""
        return {k: m if isinstance(m, Metric) else Metric(m) for k, m in self.metrics.items()}


_SCHEDULES = ("constant", "cosine", "linear", "one-cycle")
_EXAMPLES = {"model": "lambda: Net()", "optimizer": "lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)"}


def predict(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return (outputs, targets) of a batch: (inputs, targets), (input, input, ..., targets), or a mapping."""
    if isinstance(batch, Mapping):
        key = label_of(batch)
        return model(**batch), None if key is None else batch[key]
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return model(*batch[:-1]), batch[-1]
    raise ExperimentError(
        f"a batch is {describe(batch)}, neither (inputs, targets) nor a mapping: give the task a function "
        "predict=(model, batch) -> (outputs, targets)"
    )


def _tracks(layer: nn.Module) -> bool:
    """True for a normalization layer with running statistics, which a forward in training mode changes."""
    return isinstance(layer, _NormBase) and layer.running_mean is not None


def label_of(batch: Mapping[str, Any]) -> str | None:
    """Return the key of the targets of a batch that is a mapping; None if it has none."""
    return next((key for key in _LABELS if key in batch), None)


def describe(thing: Any) -> str:
    """Describe an object of a user in a few words, with its shape.

    >>> describe((torch.zeros(4, 3), {"a": torch.zeros(2)}))
    "(a tensor of shape (4, 3), {'a': a tensor of shape (2,)})"
    >>> describe(torch.zeros(4, dtype=torch.float64))  # unlike most
    'a tensor of float64 and shape (4,)'
    """
    if isinstance(thing, Tensor):
        usual = thing.dtype in (torch.float32, torch.int64)
        dtype = "" if usual else f"{thing.dtype} and ".removeprefix("torch.")
        return f"a tensor of {dtype}shape {tuple(thing.shape)}"
    if isinstance(thing, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in thing.items()) + "}"
    if isinstance(thing, tuple | list) and len(thing) <= 8:
        return f"({', '.join(map(describe, thing))})"
    return type(thing).__name__


def describe_type(thing: Any) -> str:
    """Return the type of an object, or say that it is a class.

    >>> describe_type(3), describe_type(nn.CrossEntropyLoss)
    ('int', 'the class CrossEntropyLoss')
    """
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def _own_loss(outputs: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise ExperimentError(
            f"the task has no loss=, and the model returned {describe(outputs)} without a loss of its own: give "
            "loss=(outputs, targets) -> mean loss, or labels in the batch if the model computes the loss from them"
        )
    return loss


def logits_of(outputs: Any) -> Any:
    """Return the logits of a Hugging Face output, and other outputs as they are."""
    return getattr(outputs, "logits", outputs)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}
