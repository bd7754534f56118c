"""Recipes: the configuration of a comparison. Its options, one level below its sections, are the command line's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import BASES, METHODS
from steppe.experiments.config.sections import (
    ComparisonConfig,
    DataConfig,
    EvaluationConfig,
    ForgettingConfig,
    HardwareConfig,
    ModelConfig,
    OutputConfig,
    TrainingConfig,
    check_ranges,
)
from steppe.experiments.config.task_info import IMAGES, TaskInfo
from steppe.experiments.errors import unknown
from steppe.experiments.models.vit import HEAD

# Options that decide which runs there are, or how they are observed and stored; every other one changes a run's result.
_NO_EFFECT_ON_RESULTS = frozenset(
    {
        *("name", "methods", "seeds", "first_seed", "widths", "data_dir", "checkpoint_seconds", "log", "out"),
        *("flatness_every", "flatness_samples"),
    }
)

# Options that older folders do not have, each with the value by which a run is what it was before.
_ADDED: Mapping[str, Any] = MappingProxyType({"then_lr": None, "log": ()})


# Functions from an option's JSON value to its own type, where the two differ.
_READERS: dict[str, Callable[[Any], Any]] = {
    "methods": lambda specs: tuple(_spec(s) for s in specs),
    "widths": tuple,
    "log": lambda names: (names,) if isinstance(names, str) else tuple(names),
    "data_dir": lambda path: None if path is None else Path(path),
    "out": lambda path: None if path is None else Path(path),
}


def _spec(given: MethodSpec | str | Callable[..., Any]) -> MethodSpec:
    """Return the spec of a method that is given as such, as a text or as a function."""
    if isinstance(given, MethodSpec):
        return given
    if isinstance(given, str):
        return MethodSpec.parse(given)
    name = str(getattr(given, "__name__", type(given).__name__))
    path = f"{getattr(given, '__module__', '__main__')}:{getattr(given, '__qualname__', '<>')}"
    importable = "<" not in path and not path.startswith("__main__")
    if importable:
        return MethodSpec.parse(path)
    if name in METHODS or not name.isidentifier():
        raise ValueError(
            f"methods: a function is called {name!r}: give it a name of its own, by `def`, for tables and folders"
        )
    return MethodSpec(name, function=given)


@dataclass(frozen=True)
class Recipe:
    """One comparison at equal compute; raises ValueError that names the option, its value and its meaning."""

    name: str = "demo"
    """Title of the run folder and of the figures."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    forgetting: ForgettingConfig = field(default_factory=ForgettingConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    task: TaskInfo = IMAGES
    """The metrics, and a description; those of a task of your own once it is loaded."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise ValueError(f"name={self.name!r}: it names a folder, so it must be a plain, non-empty name")
        for section in self._sections().values():
            check_ranges(section)
        self.data.check()
        self._check_training()
        self._check_methods()
        self._check_task()
        self.forgetting.check(self.data)
        self._check_flatness()
        self._check_widths()
        self._check_network()
        self._check_backbone()

    @property
    def _has_momentum(self) -> bool:
        return self.training.base in BASES and BASES[self.training.base].has_momentum

    def _check_training(self) -> None:
        training = self.training
        if training.momentum and not self._has_momentum:
            raise ValueError(f"momentum={training.momentum}: {training.base} has none that could be set; leave it at 0")
        if training.nesterov and not (training.base == "sgd" and self.base_momentum):
            raise ValueError(
                f"nesterov with base={training.base}, momentum={self.base_momentum:g}: Nesterov's momentum is SGD's, "
                "and needs a momentum above 0. Use --momentum 0.9, or leave --nesterov out"
            )
        if training.warmup >= 1:
            raise ValueError(f"warmup={training.warmup}: a part of the planned steps, 0.05 for a twentieth, below 1")
        if training.schedule == "one-cycle" and training.warmup:
            raise ValueError(f"warmup={training.warmup}: schedule=one-cycle rises by itself: leave --warmup out")
        # a task's own schedule is known when the task is loaded: this is checked again then
        if training.schedule not in ("constant", "own") and self.comparison.extra_epochs:
            raise ValueError(
                f"extra_epochs={self.comparison.extra_epochs} with schedule={training.schedule}: the learning rate is "
                "at its end where the further compute begins, and nothing would change. Leave one of them out"
            )
        if not self.data.task:
            for name in ("base", "schedule"):
                if getattr(training, name) == "own":
                    raise ValueError(f"{name}=own: only a task of your own has one. Name it with --task, or another")
            for name in ("lr", "weight_decay", "batch_size"):
                if getattr(training, name) is None:
                    raise ValueError(f"{name}=None: only a task of your own brings a {name}: give a number")

    def _check_task(self) -> None:
        if not self.data.task:
            return
        given = {name: value for name, value in vars(self.data).items() if name != "task"}
        given |= vars(self.model) | {"head_lr": self.training.head_lr, "channels_last": self.hardware.channels_last}
        usual = vars(DataConfig()) | vars(ModelConfig()) | {"head_lr": None, "channels_last": False}
        if changed := [name for name in given if given[name] != usual[name]]:
            raise ValueError(
                f"{changed[0]}={given[changed[0]]}: task={self.data.task} brings the model and the data, so it would "
                "have no effect: leave it out"
            )
        if self.training.base == "own" and self.training.momentum is not None:
            raise ValueError(
                f"momentum={self.training.momentum}: base=own is the task's own optimizer, which has its own: set it "
                "there, or use another --base"
            )

    def _check_methods(self) -> None:
        methods, training = self.comparison.methods, self.training
        if not methods or len(set(methods)) < len(methods):
            named = " ".join(map(str, methods))
            raise ValueError(f"methods={named!r}: name at least one method, each of them once")
        for spec in methods:
            spec.check(training.base, training.rho)
            method = spec.definition
            if method.plain not in (None, training.base) and training.base != "own":
                raise ValueError(
                    f"methods: {spec} is {method.summary}, but base={training.base}: a difference would mix two "
                    f"effects. Use --base {method.plain}, or {training.base} among the methods"
                )
            if method.needs_adapters and not self.data.task:
                raise ValueError(
                    f"methods: {spec} acts on LoRA adapters, and the networks for dataset={self.data.dataset} have "
                    "none: name a task of your own whose model has them, steppe compare package.module:task"
                )
            if method.needs_momentum and self._has_momentum and training.momentum == 0:
                raise ValueError(
                    f"momentum={training.momentum}: {spec} perturbs along the base's momentum, and without one each of "
                    "its steps would be a plain one. Use --momentum 0.9, or leave it out for 0.9 in all methods"
                )

    def _check_flatness(self) -> None:
        every, end = self.evaluation.flatness_every, self.comparison.epochs + self.comparison.extra_epochs
        if every is None:
            return
        if every < end and every % self.evaluation.eval_every:
            raise ValueError(
                f"flatness_every={every}: flatness is measured where the accuracies are, so it must be a multiple of "
                f"eval_every={self.evaluation.eval_every}, or at least {end}, to be measured at the end only"
            )
        if self.training.rho == 0:
            raise ValueError(
                "rho=0: sharpness is a maximum over the neighborhood of that radius, which is a single point. Use "
                "--rho 0.05, or leave --flatness-every out"
            )

    def _check_widths(self) -> None:
        found = self.comparison.widths
        if not found:
            return
        widths = f"widths={' '.join(map(str, found))}"
        if self.data.task:
            raise ValueError(
                f"{widths}: task={self.data.task} brings the model, whose width they would not change: leave them out"
            )
        if found[0] < 1 or len(set(found)) < len(found):
            raise ValueError(f"{widths}: channels of the network's first stage, each at least 1 and given once")
        if self.model.width != ModelConfig.width:
            raise ValueError(
                f"width={self.model.width}: {widths} are compared, and it would be ignored: leave it out, or them"
            )
        if self.model.backbone != "none":
            raise ValueError(f"backbone={self.model.backbone}: its width is fixed. Use --backbone none, or no --widths")

    def _check_network(self) -> None:
        model = self.model
        if model.network != "vit":
            return
        usual = ModelConfig()
        for name in ("stem_stride", "norm", "backbone"):
            if getattr(model, name) != getattr(usual, name):
                raise ValueError(
                    f"{name}={getattr(model, name)} with network=vit: it belongs to the ResNet, and would have no "
                    "effect: leave it out"
                )
        for width in self.comparison.widths or (model.width,):
            if width % HEAD:
                raise ValueError(f"width={width} with network=vit: give a multiple of {HEAD}, the features of a head")

    def _check_backbone(self) -> None:
        dataset, backbone, image_size = self.data.dataset, self.model.backbone, self.model.image_size
        kind, _, name = backbone.partition(":")
        if backbone not in ("none", "own") and not (name and kind in ("timm", "hf")):
            raise ValueError(unknown("backbone", backbone, ("none", "own", "timm:NAME", "hf:NAME", "hf:FOLDER")))
        if image_size is not None and backbone in ("none", "own"):
            raise ValueError(
                f"image_size={image_size}: images are resized for timm and hf checkpoints only, and "
                f"backbone={backbone} takes them as they are: leave it out"
            )
        if backbone == "own" and dataset != "digits":
            raise ValueError(
                f"dataset={dataset}: the own backbone is pretrained on Fashion-MNIST, and nothing would be transferred "
                "to the same images. Use --dataset digits, or --backbone none"
            )
        if backbone == "none":
            for name, value in (("freeze", self.model.freeze), ("head_lr", self.training.head_lr)):
                if value:
                    raise ValueError(
                        f"{name}={value}: without a backbone all layers are new, so it would have no effect. Use "
                        f"--backbone own or a checkpoint's name, or leave --{name.replace('_', '-')} out"
                    )
        reads_it = dataset == "fashion-mnist" or (backbone == "own" and self.model.pretrain_on != "sample")
        if self.data.data_dir is not None and dataset == "digits" and not reads_it:
            raise ValueError(
                f"data_dir={self.data.data_dir}: nothing here is read from the full Fashion-MNIST, so it would be "
                "ignored: leave it out"
            )

    def _sections(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("name", "task")}

    def options(self) -> dict[str, Any]:
        """Return every option by its name, without its section.

        >>> Recipe().options()["lr"]
        0.05
        """
        options = {"name": self.name}
        for section in self._sections().values():
            options |= vars(section)
        return options

    def replace(self, **options: Any) -> Recipe:
        """Return a recipe with other values for some options, each by its name; methods may be texts.

        Raises TypeError for a name that is no option, ValueError for a value that an option cannot take.

        >>> Recipe().replace(lr=0.1, methods=["sgd", "sam:rho=.1"]).comparison.methods[1].overrides
        (('rho', 0.1),)
        """
        if unknown := options.keys() - self.options().keys():
            raise TypeError(f"not an option of a recipe: {', '.join(sorted(unknown))}")
        values = {name: _READERS[name](v) if name in _READERS else v for name, v in options.items()}
        changed: dict[str, Any] = {"name": values.get("name", self.name)}
        for name, section in self._sections().items():
            changed[name] = replace(section, **{k: values[k] for k in vars(section) if k in values})
        return Recipe(**changed, task=self.task)

    @property
    def base_momentum(self) -> float:
        """The momentum of every method's base.

        >>> Recipe().base_momentum, Recipe().replace(methods=["sgd", "msam"]).base_momentum
        (0.0, 0.9)
        """
        if self.training.momentum is not None:
            return self.training.momentum
        needed = any(spec.definition.needs_momentum for spec in self.comparison.methods)
        return 0.9 if needed and self._has_momentum else 0.0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output.out if self.output.out is not None else Path("runs") / self.name

    def runs(self) -> Iterator[Run]:
        """Yield every run of the comparison; the methods of one seed follow each other, so pairs are soon complete.

        With `widths` there are none: each member has its own.
        """
        if self.comparison.widths:
            return
        first = self.comparison.first_seed
        for seed in range(first, first + self.comparison.seeds):
            for method in [*self.comparison.methods, *self.controls()]:
                yield Run(self, method, seed)

    def controls(self) -> list[MethodSpec]:
        """Return the first method with as much compute as it needs for the steps of each costlier one.

        With a constant learning rate there are none: its run at full compute has passed that point.

        >>> [str(spec) for spec in Recipe().replace(schedule="cosine", methods=["sgd", "sam", "gsam"]).controls()]
        ['sgd@1/2']
        """
        if self.training.is_constant:
            return []
        first, *others = self.comparison.methods
        shares = {self.comparison.share_of_as_many_steps(first, other) for other in others}
        return [replace(first, share=share) for share in sorted(shares) if share < 1]

    def members(self) -> Iterator[Recipe]:
        """Yield the comparison at each of `widths`, in a folder of its own within this one.

        >>> [str(member.folder) for member in Recipe().replace(name="wide", widths=(2, 4)).members()]
        ['runs/wide/width-2', 'runs/wide/width-4']
        """
        for width in self.comparison.widths:
            yield self.replace(width=width, widths=(), out=self.folder / f"width-{width}")

    def to_json(self) -> dict[str, Any]:
        """Return the sections with their options as JSON has them; `from_json` is the inverse."""
        text = json.dumps(
            {**vars(self), "task": asdict(self.task)},
            default=lambda v: str(v) if isinstance(v, (MethodSpec, Path)) else vars(v),
        )
        values: dict[str, Any] = json.loads(text)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Make a recipe from the output of `to_json`; ValueError when the options are not a recipe's."""
        options = dict[str, Any](_ADDED)
        for name, value in values.items():
            if name == "task":
                continue
            options |= value if isinstance(value, Mapping) else {name: value}
        options.pop("tensorboard", None)  # an older name of log, which changes no result
        if differing := options.keys() ^ cls().options().keys():
            raise ValueError(f"not the options of a recipe: {', '.join(sorted(differing))}")
        options["methods"] = [MethodSpec.read(text) for text in options["methods"]]
        return replace(cls().replace(**options), task=TaskInfo.from_json(values["task"]))

    def result_options(self) -> dict[str, Any]:
        """Return the options that a run's result depends on, as JSON has them; an older folder has the same ones."""
        options = {
            name: value
            for name, value in self.options().items()
            if name not in _NO_EFFECT_ON_RESULTS and (name, value) not in _ADDED.items()
        }
        options |= {"momentum": self.base_momentum} | ({"width": "several"} if self.comparison.widths else {})
        # the size of the model and of the data, and the metrics: another task by the same name is noticed
        return options | ({"the task": asdict(self.task)} if self.data.task else {})


@dataclass(frozen=True)
class Run:
    """One run: a method of a recipe from one seed. It can be trained independently of the others."""

    recipe: Recipe
    method: MethodSpec
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.method.folder}-seed{self.seed}"

    @property
    def standardized_epochs(self) -> int:
        """The compute of the whole run, in standardized epochs."""
        comparison = self.recipe.comparison
        if self.method.share != 1:
            return max(1, round(comparison.epochs * self.method.share))
        return comparison.epochs + (comparison.extra_epochs if self.method.passes > 1 else 0)

    @property
    def grid(self) -> list[int]:
        """The standardized epochs at which to measure: every `eval_every`, and at `epochs` and the end.

        The first method is measured after as many steps as the others make, too, which is a control.

        >>> sgd, sam = Recipe().replace(epochs=10, extra_epochs=3, eval_every=4, seeds=1).runs()
        >>> sgd.grid, sam.grid
        ([4, 5, 8, 10], [4, 8, 10, 12, 13])
        """
        return sorted(self.regular_grid | self.ends)

    @property
    def regular_grid(self) -> frozenset[int]:
        """The points of the grid that do not depend on the other methods, to which more may be added later.

        >>> sgd, sam = Recipe().replace(epochs=10, extra_epochs=3, eval_every=4, seeds=1).runs()
        >>> sorted(sgd.regular_grid), sorted(sam.regular_grid)
        ([4, 8, 10], [4, 8, 10, 12, 13])
        """
        end, every = self.standardized_epochs, self.recipe.evaluation.eval_every
        points = {*range(every, end + 1, every), self.recipe.comparison.epochs, end}
        return frozenset(point for point in points if point <= end)

    @property
    def ends(self) -> frozenset[int]:
        """The points of the grid at which the network counts as trained, and is measured in every way.

        >>> sgd, sam = Recipe().replace(epochs=10, extra_epochs=3, seeds=1).runs()
        >>> sorted(sgd.ends), sorted(sam.ends)
        ([5, 10], [10, 13])
        """
        comparison, end = self.recipe.comparison, self.standardized_epochs
        points = {comparison.epochs, end}
        if self.method == comparison.methods[0] and self.recipe.training.is_constant:
            points |= {comparison.epochs_of_as_many_steps(self.method, other) for other in comparison.methods}
        return frozenset(point for point in points if point <= end)

    @property
    def flatness_grid(self) -> frozenset[int]:
        """The points of the grid at which flatness is measured: every `flatness_every`, and at `epochs` and the end.

        >>> recipe = Recipe().replace(epochs=10, extra_epochs=2, eval_every=2, flatness_every=4, seeds=1)
        >>> [sorted(run.flatness_grid) for run in recipe.runs()]
        [[4, 8, 10], [4, 8, 10, 12]]
        """
        every = self.recipe.evaluation.flatness_every
        if every is None:
            return frozenset()
        ends = (self.recipe.comparison.epochs, self.standardized_epochs)
        return frozenset(point for point in self.grid if point % every == 0 or point in ends)

    def steps(self, batches: int) -> int:
        """Return the planned number of steps until the compute that all methods get is spent, for an epoch's batches.

        A schedule ends there: further compute (`extra_epochs`) continues with its last value.

        >>> recipe = Recipe().replace(methods=["sgd", "late_sam:start=0.75"], epochs=10, batch_size=64, seeds=1)
        >>> [run.steps(batches=47) for run in recipe.runs()]
        [470, 376]
        """
        return math.ceil(self.recipe.comparison.epochs * self.method.share * batches / self.method.passes)
