"""Recipes: what a comparison trains, on what and for how long. The dataclass *is* the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from steppe.experiments.config.checks import check
from steppe.experiments.config.method_spec import MethodSpec, parse
from steppe.experiments.config.methods import BASES
from steppe.experiments.data.batches import count
from steppe.experiments.data.datasets import DatasetName

__all__ = ["LATER", "RECIPES", "Recipe", "Run"]

# Fields that say which runs there are, or how they are watched and kept; every other field changes a run's result.
_FREE = frozenset(
    {
        *("name", "methods", "seeds", "first_seed", "widths", "data_dir", "checkpoint_seconds", "tensorboard", "out"),
        *("flatness_every", "flatness_samples"),
    }
)

LATER: Mapping[str, Any] = MappingProxyType(
    {
        "shots": None,
        "backbone": "none",
        "pretrain_on": "auto",
        "pretrain_epochs": 3,
        "freeze": False,
        "head_lr": None,
        "image_size": None,
        "label_noise": 0.0,
        "widths": (),
        "flatness_every": None,
        "flatness_samples": 256,
        "cuda_graphs": False,
    }
)
"""Fields that are younger than the run folders that there may be, with the values that these were made with."""


@dataclass(frozen=True)
class Recipe:
    """One comparison at equal compute; raises ValueError that names the field, its value and its meaning."""

    name: str = "demo"
    """Title of the run folder and of the figures."""
    dataset: DatasetName = "sample"
    """fashion-mnist: the whole data set. sample: 3000 training and 3000 test images of it, comes with Steppe. digits:
    scikit-learn's 1797 handwritten digits, one in three of them for testing (needs the finetune extra)."""
    shots: int | None = None
    """Train on so many images of each class, drawn by the run's seed; by default on all."""
    label_noise: float = 0.0
    """The share of the training images that get a wrong label, drawn by the run's seed. Training loss, training
    accuracy and gap are measured on the labels that are trained on; the test labels stay as they are."""
    backbone: str = "none"
    """Where runs start from. none: random weights. own: the same network, pretrained once on Fashion-MNIST and kept in
    the user's cache. timm:NAME, hf:NAME or hf:FOLDER: a checkpoint. Its last layer is begun anew."""
    pretrain_on: Literal["auto", "fashion-mnist", "sample"] = "auto"
    """What the own backbone is pretrained on; auto: the whole Fashion-MNIST where it is on this machine, else the
    sample."""
    pretrain_epochs: int = 3
    """Epochs of that, with SGD (lr 0.05, momentum 0.9, batch 128)."""
    freeze: bool = False
    """Train the new head only (a linear probe): the backbone stays as it is, its running statistics too."""
    head_lr: float | None = None
    """Learning rate of the new head; by default that of the rest."""
    image_size: int | None = None
    """Height and width to which images are resized for a timm or hf checkpoint; by default what it was trained on."""
    data_dir: Path | None = None
    """Folder of the full Fashion-MNIST; else $STEPPE_DATA, the system's package, the user's cache, or a download."""
    methods: tuple[str, ...] = ("sgd", "sam")
    """The methods, each as NAME or NAME:KEY=VALUE,... (looksam:k=2). The others are compared with the first."""
    base: Literal["sgd", "adamw"] = "sgd"
    """The base optimizer, plain and inside SAM."""
    lr: float = 0.05
    """Learning rate, constant."""
    momentum: float | None = None
    """Momentum of SGD; by default 0, or 0.9 for all methods when one of them (msam) climbs along it."""
    weight_decay: float = 0.0
    """Weight decay of the base optimizer."""
    rho: float = 0.05
    """Radius of SAM's neighborhood; a method takes its usual multiple of it, unless its spec gives a rho."""
    batch_size: int = 64
    """Images in one step at most, over all devices together: an epoch is cut into batches of nearly the same size."""
    epochs: int = 20
    """Standardized epochs: the compute that each method gets. One is as many gradient evaluations as there are
    training images, so an epoch of SAM (two passes) counts as 2."""
    extra_epochs: int = 0
    """Further standardized epochs for methods with more than one pass a step; they have rows of their own."""
    width: int = 16
    """Width of the PreAct ResNet-18: channels of its first stage; the full network has 64."""
    widths: tuple[int, ...] = ()
    """Compare at each of these widths, and draw the errors over the number of parameters; `width` is then not used."""
    stem_stride: int = 2
    """Stride of its first convolution: 1 as in the article, 2 for a quarter of the work."""
    norm: Literal["batch", "group"] = "batch"
    """Its normalization layers. Several processes on CPUs need group."""
    seeds: int = 3
    """Runs of each method. Raise it later to add runs to the same folder; one run gives no verdict."""
    first_seed: int = 0
    """Seed of the first run. Methods of one seed share initial weights and the order of the images."""
    eval_every: int = 2
    """Standardized epochs from one measurement on the whole training and test set to the next."""
    flatness_every: int | None = None
    """Measure sharpness S(w) at `rho`, the largest eigenvalue of the Hessian and the gradient norm as well: every so
    many standardized epochs, a multiple of `eval_every`, and at the end. By default not."""
    flatness_samples: int = 256
    """Training images that they are measured on, drawn by the run's seed, in evaluation mode."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    amp: bool | None = None
    """Compute in bfloat16 where it is safe (autocast); the weights stay float32. By default where the machine has
    instructions for it."""
    channels_last: bool = False
    """Keep images and convolutions in the channels-last layout: faster on most machines."""
    compile: bool = False
    """Compile the network with torch.compile. Runs that are resumed may then differ in the last bits."""
    cuda_graphs: bool | None = None
    """Capture training steps as CUDA graphs, where the method allows it; by default on a GPU."""
    threads: int | None = None
    """CPU threads of a run; by default 1. Results differ in the last bits with their number."""
    checkpoint_seconds: float = 60.0
    """Seconds from one checkpoint within an epoch to the next; there is always one at an epoch's end."""
    tensorboard: bool = False
    """Log to RUN/tensorboard as well (needs the tensorboard extra)."""
    out: Path | None = None
    """The run folder; by default runs/NAME. The same command in the same folder goes on where it stopped."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(sorted(self.widths)))
        check(self)
        self._check_methods()

    def _check_methods(self) -> None:
        specs = [parse(method) for method in self.methods]
        # one way to write each, so that the same method is found again in its folder
        object.__setattr__(self, "methods", tuple(str(spec) for spec in specs))
        if not specs or len(set(specs)) < len(specs):
            raise ValueError(f"methods={' '.join(self.methods)!r}: name at least one method, each of them once")
        for spec in specs:
            spec.check(self.base, self.rho)
            if spec.method.plain not in (None, self.base):
                raise ValueError(
                    f"methods: {spec} is {spec.method.summary}, but base={self.base}: a difference would mix two "
                    f"effects. Say --base {spec.method.plain}, or {self.base} among the methods"
                )
            if spec.method.needs_momentum and BASES[self.base].has_momentum and self.momentum == 0:
                raise ValueError(
                    f"momentum={self.momentum}: {spec} climbs along the base's momentum, and without one each of its "
                    "steps would be a plain one. Say --momentum 0.9, or leave it out: it is 0.9 for all methods then"
                )

    @property
    def base_momentum(self) -> float:
        """The momentum of every method's base.

        >>> Recipe().base_momentum, Recipe(methods=("sgd", "msam")).base_momentum
        (0.0, 0.9)
        """
        if self.momentum is not None:
            return self.momentum
        needed = BASES[self.base].has_momentum and any(parse(m).method.needs_momentum for m in self.methods)
        return 0.9 if needed else 0.0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out if self.out is not None else Path("runs") / self.name

    def runs(self) -> Iterator[Run]:
        """Every run of the comparison; the methods of one seed follow each other, so pairs are soon complete.

        With `widths` there are none: each member has its own.
        """
        if self.widths:
            return
        for seed in range(self.first_seed, self.first_seed + self.seeds):
            for method in self.methods:
                yield Run(self, method, seed)

    def members(self) -> Iterator[Recipe]:
        """The comparison at each of `widths`, in a folder of its own within this one.

        >>> [str(member.folder) for member in Recipe(name="wide", widths=(2, 4)).members()]
        ['runs/wide/width-2', 'runs/wide/width-4']
        """
        for width in self.widths:
            yield replace(self, width=width, widths=(), out=self.folder / f"width-{width}")

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON has it; `from_json` is the way back."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()} | {
            "methods": list(self.methods),
            "widths": list(self.widths),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Make a recipe of what `to_json` gave; ValueError when the fields are not a recipe's."""
        names, values = {field.name for field in fields(cls)}, {**LATER, **values}
        if names != set(values):
            raise ValueError(f"not the fields of a recipe: {', '.join(sorted(names ^ set(values)))}")
        paths = {k: Path(values[k]) for k in ("data_dir", "out") if values[k] is not None}
        return cls(**{**values, **paths, **{k: tuple(values[k]) for k in ("methods", "widths")}})

    def result(self) -> dict[str, Any]:
        """The fields that a run's result depends on.

        One of `LATER` that has the value there says nothing that older run folders do not say.
        """
        said = {k: v for k, v in self.to_json().items() if k not in _FREE and not (k in LATER and v == LATER[k])}
        return said | {"momentum": self.base_momentum} | ({"width": "several"} if self.widths else {})


@dataclass(frozen=True)
class Run:
    """One run: a method of a recipe from one seed. It can be trained without knowing of the others."""

    recipe: Recipe
    method: str
    seed: int

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.spec.folder}-seed{self.seed}"

    @property
    def spec(self) -> MethodSpec:
        """The method with its arguments."""
        return parse(self.method)

    @property
    def standardized_epochs(self) -> int:
        """The compute of the whole run, in standardized epochs."""
        return self.recipe.epochs + (self.recipe.extra_epochs if self.spec.passes > 1 else 0)

    @property
    def grid(self) -> list[int]:
        """The standardized epochs at which to measure: every `eval_every`, and at `epochs` and the end.

        >>> sgd, sam = Recipe(epochs=10, extra_epochs=3, eval_every=4, seeds=1).runs()
        >>> sgd.grid, sam.grid
        ([4, 8, 10], [4, 8, 10, 12, 13])
        """
        end, every = self.standardized_epochs, self.recipe.eval_every
        return sorted({*range(every, end + 1, every), self.recipe.epochs, end})

    @property
    def flatness_grid(self) -> frozenset[int]:
        """The points of the grid at which flatness is measured: every `flatness_every`, and at `epochs` and the end.

        >>> sgd, sam = Recipe(epochs=10, extra_epochs=2, eval_every=2, flatness_every=4, seeds=1).runs()
        >>> sorted(sgd.flatness_grid), sorted(sam.flatness_grid)
        ([4, 8, 10], [4, 8, 10, 12])
        """
        every = self.recipe.flatness_every
        if every is None:
            return frozenset()
        ends = (self.recipe.epochs, self.standardized_epochs)
        return frozenset(point for point in self.grid if point % every == 0 or point in ends)

    def steps(self, images: int) -> int:
        """How many steps it will make until the compute that all methods get is spent, as planned.

        A schedule ends there: further compute (`extra_epochs`) goes on with what it ends with.

        >>> sgd, late = Recipe(methods=("sgd", "late_sam:start=0.75"), epochs=10, batch_size=64, seeds=1).runs()
        >>> sgd.steps(3000), late.steps(3000)
        (470, 376)
        """
        return math.ceil(self.recipe.epochs * count(images, self.recipe.batch_size) / self.spec.passes)


_SMALL = Recipe(channels_last=True)

RECIPES: Mapping[str, tuple[Recipe, str]] = MappingProxyType(
    {
        "demo": (
            replace(_SMALL, seeds=5),
            "A few minutes on two CPU cores: a narrow network on a sample of Fashion-MNIST.",
        ),
        "article": (
            replace(
                _SMALL,
                name="article",
                dataset="fashion-mnist",
                batch_size=128,
                epochs=150,
                extra_epochs=50,
                width=64,
                stem_stride=1,
                momentum=0.0,
            ),
            "The article's experiment: PreAct ResNet-18 on the whole of Fashion-MNIST, 150 standardized epochs and "
            "50 further ones of SAM: work for a GPU. The article does not give the batch size: 128 is ours.",
        ),
        "finetune": (
            replace(
                _SMALL,
                name="finetune",
                dataset="digits",
                backbone="own",
                width=8,
                lr=0.01,
                momentum=0.9,
                batch_size=32,
                epochs=20,
                # float32 and one thread: every machine has the same bits. And not channels_last: with several threads,
                # torch 2.13's backward of a strided 1x1 convolution writes beyond its memory in that layout, when the
                # number of channels is no multiple of 16 and that of images odd
                amp=False,
                channels_last=False,
                threads=1,
            ),
            "A narrow network, pretrained once on Fashion-MNIST, fine-tuned on scikit-learn's handwritten digits: a "
            "few minutes on two CPU cores.",
        ),
        "double-descent": (
            replace(
                _SMALL,
                name="double-descent",
                widths=(1, 2, 3, 4, 6, 8, 12, 16),
                shots=150,
                label_noise=0.2,
                stem_stride=4,
                lr=0.05,
                momentum=0.9,
                batch_size=75,
                epochs=120,
                eval_every=20,
                flatness_every=120,
                amp=False,  # all three as in finetune, for the same reasons
                channels_last=False,
                threads=1,
            ),
            "Widths from below to beyond the interpolation threshold, on labels of which a fifth are wrong: errors and "
            "sharpness over the number of parameters.",
        ),
    }
)
