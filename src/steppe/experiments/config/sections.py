"""Sections of a recipe. A field is an option of the command line, and its docstring the help."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.data.datasets import DatasetName
from steppe.experiments.data.sampling import LabelNoise
from steppe.experiments.errors import unknown
from steppe.experiments.models.networks import NetworkName


@dataclass(frozen=True)
class Minimum:
    """The smallest value of an option, or the bound below all values, and the option's meaning."""

    limit: int
    meaning: str
    included: bool = True


_LARGEST = 2**62
"""Of whole numbers: seeds and counts are integers of 64 bits elsewhere, and are added to each other."""


_KINDS: Mapping[type, tuple[type | tuple[type, ...], str]] = MappingProxyType(
    {
        bool: (bool, "True or False"),
        int: (int, "a whole number"),
        float: ((int, float), "a number"),
        str: (str, "a text"),
    }
)


def check_ranges(section: object) -> None:
    """Raise ValueError for an option that is of another kind or out of its range; None is in every range.

    Numbers of NumPy and tensors of one number become those of Python.
    """
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value = _of_kind(name, getattr(section, name), hint)
        object.__setattr__(section, name, value)
        if get_origin(hint) is not Annotated or value is None:
            continue
        (minimum,) = hint.__metadata__
        limit, meaning = minimum.limit, minimum.meaning
        if minimum.included and not (math.isfinite(value) and value >= limit):
            raise ValueError(f"{name}={value}: {meaning}, must be a finite number of at least {limit}")
        if not minimum.included and not (math.isfinite(value) and value > limit):
            raise ValueError(f"{name}={value}: {meaning} must be a finite number above {limit}")
        if isinstance(value, int) and value > _LARGEST:
            raise ValueError(f"{name}={value}: {meaning}, must be at most {_LARGEST}, so that it fits into 64 bits")


def _of_kind(name: str, value: Any, hint: Any) -> Any:
    """Return the value of an option as one of Python's own; ValueError if it is of another kind than its hint."""
    kinds = list(_flat(hint))
    if value is None and type(None) in kinds:
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    known = [one for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
    if known:
        if str(value) not in known:
            raise ValueError(unknown(name, str(value), known))
        return str(value)
    for kind in kinds:
        if kind in _KINDS:
            wanted, words = _KINDS[kind]
            if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{name}={value!r}: {words} is needed, and it is {type(value).__name__}")
    return value


def _flat(hint: Any) -> Iterator[Any]:
    """Yield the types of a hint, each of a union."""
    if get_origin(hint) is Annotated:
        yield from _flat(get_args(hint)[0])
    elif get_origin(hint) in (Union, UnionType):
        for one in get_args(hint):
            yield from _flat(one)
    else:
        yield hint


@dataclass(frozen=True)
class DataConfig:
    """The images and their labels, or a task of the user's own."""

    task: str = ""
    """A task of your own, package.module:name: a steppe.experiments.Task or a function that returns one. It brings the
    model and the data, and the options of images and networks are not used."""
    dataset: DatasetName = "sample"
    """fashion-mnist: the whole data set. sample: 3000 training and 3000 test images of it, included in Steppe. digits:
    scikit-learn's 1797 handwritten digits, one in three of them for testing (needs the finetune extra)."""
    shots: Annotated[int | None, Minimum(1, "training images of each class")] = None
    """Training images per class, drawn by the run's seed; by default all."""
    label_noise: Annotated[float, Minimum(0, "the fraction of training images with a wrong label")] = 0.0
    """Fraction of the training images that get a wrong label, drawn by the run's seed. Training loss, training
    accuracy and gap are measured on these labels; the test labels are unchanged."""
    label_noise_kind: LabelNoise = "uniform"
    """The wrong labels. uniform: any other class. next: the class after the right one, 0 after the last; such errors
    agree with each other, and are harder to resist."""
    data_dir: Path | None = None
    """Folder of the full Fashion-MNIST; else $STEPPE_DATA, the system's package, the user's cache, or a download."""

    def check(self) -> None:
        """Raise ValueError for label noise that cannot be."""
        if self.label_noise >= 1:
            raise ValueError(
                f"label_noise={self.label_noise}: a fraction of the training images, 0.2 for one in five, must be "
                "below 1"
            )
        if self.label_noise_kind != "uniform" and not self.label_noise:
            raise ValueError(
                f"label_noise_kind={self.label_noise_kind} with label_noise=0: no label is wrong, so it would have no "
                "effect. Use --label-noise 0.4, or leave it out"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The network and its initial weights."""

    network: NetworkName = "preact-resnet-18"
    """The network. vit: a vision transformer of four blocks on patches of 4 x 4 pixels."""
    width: Annotated[int, Minimum(1, "channels of the network's first stage")] = 16
    """Width of the network. Of the PreAct ResNet-18, channels of its first stage; the full network has 64. Of the
    vision transformer, features of a patch, a multiple of 16."""
    stem_stride: Annotated[int, Minimum(1, "the stride of the network's first convolution")] = 2
    """Stride of the ResNet's first convolution: 1 as in the article, 2 for a quarter of the work."""
    norm: Literal["batch", "group"] = "batch"
    """The ResNet's normalization layers. Several processes on CPUs need group."""
    backbone: str = "none"
    """Initial weights. none: random. own: the same network, pretrained once on Fashion-MNIST and kept in the user's
    cache. timm:NAME, hf:NAME or hf:FOLDER: a checkpoint. Its last layer is replaced by a new one."""
    pretrain_on: Literal["auto", "fashion-mnist", "sample"] = "auto"
    """Data that the own backbone is pretrained on; auto: the whole Fashion-MNIST if it is on this machine, else the
    sample."""
    pretrain_epochs: Annotated[int, Minimum(1, "the epochs that the backbone is pretrained for")] = 3
    """Epochs of this pretraining, with SGD (lr 0.05, momentum 0.9, batch 128)."""
    freeze: bool = False
    """Train the new head only (a linear probe): weights and running statistics of the backbone are unchanged."""
    image_size: Annotated[int | None, Minimum(1, "height and width of the images that a checkpoint gets")] = None
    """Height and width to which images are resized for a timm or hf checkpoint; by default those of its training."""


BaseName = Literal[
    "sgd", "adamw", "adam", "nadam", "radam", "rmsprop", "adagrad", "adadelta", "adamax", "adafactor", "own"
]
Schedule = Literal["constant", "cosine", "linear", "one-cycle", "own"]


@dataclass(frozen=True)
class TrainingConfig:
    """The base optimizer, the radius and the batch size."""

    base: BaseName = "sgd"
    """The base optimizer, plain and inside SAM; own: that of a task of your own."""
    lr: Annotated[float | None, Minimum(0, "the learning rate", included=False)] = 0.05
    """Learning rate; None: that of a task's own optimizer."""
    schedule: Schedule = "constant"
    """Course of the learning rate over the planned steps, from lr to 0 unless constant. one-cycle: up from lr / 25 in
    the first 30 % of the steps, then down; lr is its largest value. own: that of a task of your own."""
    warmup: Annotated[float, Minimum(0, "the part of the steps in which the learning rate rises")] = 0.0
    """Part of the planned steps in which the learning rate rises linearly from lr / 100 to lr; 0.05 for a twentieth."""
    head_lr: Annotated[float | None, Minimum(0, "the head's learning rate", included=False)] = None
    """Learning rate of the new head; by default that of the rest."""
    momentum: Annotated[float | None, Minimum(0, "SGD's momentum")] = None
    """Momentum of SGD; by default 0, or 0.9 for all methods when one of them (msam) perturbs along it."""
    nesterov: bool = False
    """Nesterov's momentum, for SGD."""
    weight_decay: Annotated[float | None, Minimum(0, "the base optimizer's weight decay")] = 0.0
    """Weight decay of the base optimizer; None: that of a task's own optimizer."""
    clip: Annotated[float | None, Minimum(0, "the largest norm of the gradient", included=False)] = None
    """Largest norm of the gradient that the base optimizer gets: longer ones are scaled down. By default no limit."""
    accumulate: Annotated[int, Minimum(1, "micro-batches in one step")] = 1
    """Micro-batches that the gradient of every pass is accumulated over, to save memory."""

    @property
    def is_constant(self) -> bool:
        """True if the learning rate is the same in all steps."""
        return self.schedule == "constant" and not self.warmup

    rho: Annotated[float, Minimum(0, "the radius of SAM's neighborhood")] = 0.05
    """Radius of SAM's neighborhood; a method takes its usual multiple of it, unless its spec gives a rho."""
    batch_size: Annotated[int | None, Minimum(1, "samples in one optimizer step")] = 64
    """Maximum number of samples per step, over all devices; the batches of an epoch differ in size by one at most.
    None: that of a task of your own, or 64."""


@dataclass(frozen=True)
class HardwareConfig:
    """The device and the precision."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto takes a GPU if there is one."""
    amp: bool | None = None
    """Compute in bfloat16 where it is safe (autocast); the weights stay float32. By default where the machine has
    instructions for it."""
    channels_last: bool = False
    """Keep images and convolutions in the channels-last layout: faster on most machines."""
    compile: bool = False
    """Compile the network with torch.compile. Runs that are resumed may then differ in the last bits."""
    cuda_graphs: bool | None = None
    """Capture training steps as CUDA graphs, where the method allows it; by default on a GPU."""
    threads: Annotated[int | None, Minimum(1, "the number of CPU threads")] = None
    """CPU threads of a run; by default 1. Results differ in the last bits with their number."""


@dataclass(frozen=True)
class ComparisonConfig:
    """The methods, the seeds and the compute of each run."""

    methods: tuple[MethodSpec, ...] = (MethodSpec("sgd"), MethodSpec("sam"))
    """The methods, each as NAME or NAME:KEY=VALUE,... (looksam:interval=2). The others are compared with the first."""
    epochs: Annotated[int, Minimum(1, "the compute that each method gets")] = 20
    """Standardized epochs: the compute of each method. One is as many gradient evaluations as there are training
    samples, so an epoch of SAM (two passes) counts as 2."""
    extra_epochs: Annotated[int, Minimum(0, "further compute for the methods with more than one pass a step")] = 0
    """Further standardized epochs for methods with more than one pass a step; they have rows of their own."""
    widths: tuple[int, ...] = ()
    """Compare at each of these widths, and draw the errors over the number of parameters; `width` is then not used."""
    seeds: Annotated[int, Minimum(1, "runs of each method")] = 3
    """Runs of each method. Raise it later to add runs to the same folder; one run gives no verdict."""
    first_seed: Annotated[int, Minimum(0, "the first run's seed")] = 0
    """Seed of the first run. Methods of one seed share initial weights and the order of the samples."""

    def epochs_of_as_many_steps(self, method: MethodSpec, other: MethodSpec) -> int:
        """Return the standardized epochs after which `method` has made as many steps as `other` at equal compute.

        >>> ComparisonConfig(epochs=20).epochs_of_as_many_steps(MethodSpec("sgd"), MethodSpec("sam"))
        10
        """
        return max(1, round(self.epochs * self.share_of_as_many_steps(method, other)))

    def share_of_as_many_steps(self, method: MethodSpec, other: MethodSpec) -> Fraction:
        """Return the part of the compute in which `method` makes as many steps as `other` in the whole of it.

        It is 1 where that part is the whole to the nearest standardized epoch, in which parts are measured.

        >>> sgd, sam = MethodSpec("sgd"), MethodSpec("sam")
        >>> [str(ComparisonConfig(epochs=n).share_of_as_many_steps(sgd, sam)) for n in (1, 2)]
        ['1', '1/2']
        """
        share = method.passes / other.passes
        is_part = share < 1 and max(1, round(self.epochs * share)) < self.epochs
        return share if is_part else max(share, Fraction(1))

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(sorted(self.widths)))


@dataclass(frozen=True)
class EvaluationConfig:
    """The measurements during training."""

    eval_every: Annotated[int, Minimum(1, "standardized epochs from one measurement to the next")] = 2
    """Standardized epochs from one measurement on the whole training and test set to the next."""
    flatness_every: Annotated[
        int | None, Minimum(1, "standardized epochs from one measurement of flatness to the next")
    ] = None
    """Measure sharpness S(w) at `rho`, the largest eigenvalue of the Hessian and the gradient norm as well: every so
    many standardized epochs, a multiple of `eval_every`, and at the end. By default not."""
    flatness_samples: Annotated[int, Minimum(1, "training samples that flatness is measured on")] = 256
    """Training samples for these measurements, drawn by the run's seed, in evaluation mode."""


_SECOND_TASKS = {
    "rotated": "the same images, rotated by 90 degrees",
    "inverted": "the same images, black and white exchanged",
    "sample": "a sample of Fashion-MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
}


@dataclass(frozen=True)
class ForgettingConfig:
    """A second task after each run, to measure how much of the first is forgotten."""

    then: str = ""
    """Train a copy of each trained network on a second task, with the base alone, and measure what it forgets of the
    first. rotated, inverted: the same images, changed. sample, fashion-mnist, digits: other images. After a task of
    your own, another one, package.module:task. By default none."""
    then_epochs: Annotated[int, Minimum(1, "epochs on the second task")] = 5
    """Epochs on the second task, at a constant learning rate. They do not count as compute."""
    then_lr: Annotated[float | None, Minimum(0, "learning rate on the second task", included=False)] = None
    """Learning rate on the second task; by default that of the base on the first."""

    def check(self, data: DataConfig) -> None:
        """Raise ValueError for a second task that cannot follow the first."""
        if not self.then:
            if self.then_lr is not None and not data.task:
                raise ValueError(
                    f"then_lr={self.then_lr}: no second task is named, so it would have no effect: name one, --then "
                    "rotated, or leave it out"
                )
            return
        if data.task and ":" not in self.then:
            raise ValueError(
                f"then={self.then}: after a task of your own comes another of your own, package.module:task, with data "
                "that the model takes"
            )
        if not data.task and ":" in self.then:
            raise ValueError(
                f"then={self.then}: a task of your own comes after another of your own only, because the networks for "
                f"dataset={data.dataset} take images of one size in ten classes: name the first task as well, steppe "
                "compare package.module:task"
            )
        if not data.task and self.then not in _SECOND_TASKS:
            raise ValueError(unknown("then", self.then, _SECOND_TASKS))
        if self.then == data.dataset and not data.task:
            raise ValueError(f"then={self.then}: it is the first task, dataset={data.dataset}: name another one")

    @property
    def description(self) -> str:
        """The second task in words."""
        return _SECOND_TASKS.get(self.then, self.then) or "that of the task"


LogName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True)
class OutputConfig:
    """The run folder, checkpoints and logs."""

    out: Path | None = None
    """The run folder; by default runs/NAME. The same command in the same folder resumes it."""
    checkpoint_seconds: Annotated[float, Minimum(0, "seconds from one checkpoint within an epoch to the next")] = 60.0
    """Seconds from one checkpoint within an epoch to the next; there is always one at an epoch's end."""
    log: tuple[LogName, ...] = ()
    """Log the measurements to these services as well. tensorboard: event files in RUN/tensorboard (needs the
    tensorboard extra). wandb: Weights & Biases, the project steppe or $WANDB_PROJECT (needs wandb). mlflow: an
    experiment by the comparison's name, at $MLFLOW_TRACKING_URI (needs mlflow)."""

    def __post_init__(self) -> None:
        for name in self.log:
            if name not in get_args(LogName):
                raise ValueError(unknown("log", str(name), get_args(LogName)))
