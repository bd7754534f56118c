"""The commands, as tyro reads them: their fields are the options, their docstrings the help.

scripts/make_command_line.py writes them down for `steppe --help`, which reads that file and not this one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

import tyro
from rich.console import Console

from steppe.experiments.comparison import compare, plot
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import Method
from steppe.experiments.config.presets import RECIPES, name_of_task
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.task_info import TaskInfo
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.measure_runs import measure_runs
from steppe.experiments.measuring.user_model import UserModel, measure_user_model
from steppe.experiments.methods_table import methods
from steppe.experiments.tuning.options import TuningOptions
from steppe.experiments.tuning.tune import check_search, is_tuning, report_tuning, tune

_COMPARE = "Train methods at equal compute and show which generalizes better."
_FINETUNE = "Fine-tune a pretrained network with the base and with SAM at equal compute: the recipe finetune."

_FINETUNE_DETAILS = """
It is `steppe compare finetune`: the same options, run folder and figures; `steppe tune finetune` searches its rho.

--shots 10 trains on ten images of each class; --backbone none from scratch; --freeze the new head only. A checkpoint
by its name, or a folder of one: --backbone timm:resnet18.a1_in1k, --backbone hf:microsoft/resnet-18 --image-size 64.
"""

_MEASURE = "Measure how flat the minima of a run folder are, or those of any model, and compare the methods."

_MEASURE_DETAILS = """
`steppe measure runs/demo` measures every run that is not measured yet, on a sample of its training data: sharpness,
the Hessian's largest eigenvalues, trace and spectral density, adaptive measures that rescaling the network does not
change, landscapes, and the loss between solutions. It adds a verdict with error bars to summary.md and report.html.

Any model: steppe measure --model package.module:factory --weights a.pt b.pt --data package.module:factory

With --against c.pt d.pt, weights of another method in the same order, a verdict states which minima are flatter.
"""

_METHODS = "List the methods: cost, memory, paper, when to use each; or show the card of one."

_PLOT = "Draw the figures of a run folder and write its summary again, from the folder alone."

_TUNE = "Search rho and other options at equal compute, judged by data that are held out of training."

_TUNE_DETAILS = """
All options of `steppe compare` are accepted: `--methods sam asam` tunes both.

A task of your own: `steppe tune package.module:task`. Its first metric decides, in its direction.

Trials are judged by data that are held out of the training set; the test set is not used. At the end, a command is
printed that evaluates the best values on the test set. The same command in the same folder resumes a search that was
stopped or killed; a larger --trials adds trials, and further --methods add theirs. Several processes with the same
folder or the same --storage share the trials.
"""

_DETAILS = """
`steppe compare` alone runs the recipe demo; every option of a recipe can be set: `steppe compare --seeds 3`.
`steppe compare demo --help` and `steppe compare article --help` list them, with the values of the recipe.

The run folder keeps configuration, metrics, checkpoints, summary and figures. The same command in the same folder
resumes where it was stopped or killed, and ends with the same bits. Raise --seeds or --methods to add runs.

On several devices: torchrun --nproc-per-node 2 -m steppe compare ...

On CPUs, as many runs are trained at a time as there is room for (--runs-at-once); on many machines: --on ray

The methods are named by --methods, with arguments that differ from the usual ones:
`--methods sgd sam sam:rho=0.1 looksam:interval=2,rho=0.1`. They are, with their arguments in brackets:
"""

# Options that are yes, no or left open.
OPEN = ("amp", "cuda-graphs")

# Not an option. Annotated here and not in the class, because the processes that train should not import tyro.
Recipe.__annotations__["task"] = tyro.conf.Suppress[TaskInfo]

if TYPE_CHECKING:
    AnyRecipe = Recipe
else:
    AnyRecipe = tyro.extras.subcommand_type_from_defaults(
        {name: recipe for name, (recipe, _) in RECIPES.items()},
        {name: summary for name, (_, summary) in RECIPES.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command, with the option that all have."""

    json: bool = False
    """Print one JSON document on stdout, and everything else on stderr."""

    @abstractmethod
    def run(self, command: Sequence[str], console: Console) -> Any:
        """Run it, as the words of the command line say; return what `--json` prints."""


@dataclass(frozen=True)
class Compare(Command):
    """`steppe compare`."""

    recipe: AnyRecipe
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)

    def run(self, command: Sequence[str], console: Console) -> Any:
        summary = compare(self.recipe, command, console, self.execution)
        return None if summary is None else {"folder": str(self.recipe.folder), **summary.json()}


@dataclass(frozen=True)
class Finetune(Compare):
    """`steppe finetune`: `steppe compare` with its recipe finetune."""

    recipe: Recipe = RECIPES["finetune"][0]


@dataclass(frozen=True)
class Tune(Command):
    """`steppe tune`."""

    recipe: AnyRecipe
    search: TuningOptions = field(default_factory=TuningOptions)
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)

    def __post_init__(self) -> None:
        check_search(self.recipe, self.search)

    def run(self, command: Sequence[str], console: Console) -> Any:
        result = tune(self.recipe, self.search, command, console, self.execution)
        return {"folder": str(result.path), **result.json()}


@dataclass(frozen=True)
class Measure(Command):
    """`steppe measure`."""

    folder: tyro.conf.Positional[Path | None] = None
    """The run folder, for example runs/demo; or none, and --model with --data."""
    measurement: MeasuringOptions = field(default_factory=MeasuringOptions)
    model: UserModel = field(default_factory=UserModel)

    def __post_init__(self) -> None:
        if (self.folder is None) != bool(self.model.model):
            raise ValueError("steppe measure: name one of two, a run folder or a --model with its --data")

    def run(self, command: Sequence[str], console: Console) -> Any:
        if self.folder is None:
            return measure_user_model(self.model, self.measurement, console)
        measure_runs(self.folder, self.measurement, console)
        return {"folder": str(self.folder), **plot(self.folder, console).json()}


@dataclass(frozen=True)
class Plot(Command):
    """`steppe plot`."""

    folder: tyro.conf.Positional[Path]
    """The run folder, for example runs/demo."""

    def run(self, command: Sequence[str], console: Console) -> Any:
        summary = (report_tuning if is_tuning(self.folder) else plot)(self.folder, console)
        return {"folder": str(self.folder), **summary.json()}


@dataclass(frozen=True)
class Methods(Command):
    """`steppe methods`."""

    patterns: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names or labels, with wildcards: gsam, '*sam', 'Late*'. One method's name shows its card; nothing lists all."""
    bibtex: bool = False
    """Print the BibTeX of what they use."""

    def run(self, command: Sequence[str], console: Console) -> Any:
        return methods(self.patterns, console, bibtex=self.bibtex)


REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _method_specs(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Read the methods of a recipe, which is no annotation there because tyro is needed on the command line only."""
    if info.type is MethodSpec:  # without a rule for the element, tyro takes the tuple for a nested dataclass
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="METHOD",
            instance_from_str=lambda words: MethodSpec.parse(words[0]),
            is_instance=lambda value: isinstance(value, MethodSpec),
            str_from_instance=lambda spec: [str(spec)],
        )
    if get_args(info.type) != (MethodSpec, ...):
        return None
    # and a rule for the tuple, because tyro drops the error message of an element
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[METHOD [METHOD ...]]",
        instance_from_str=lambda words: tuple(map(MethodSpec.parse, words)),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda specs: [str(spec) for spec in specs],
    )


@dataclass(frozen=True)
class Verb:
    """A command, and what its help says of it."""

    kind: type
    summary: str
    details: str
    examples: tuple[tuple[str, str], ...]
    """Commands, and what each does."""
    usage: str = "[OPTIONS]"


VERBS: Mapping[str, Verb] = MappingProxyType(
    {
        "compare": Verb(
            Compare,
            _COMPARE,
            _DETAILS,
            (
                ("steppe compare", "the demo: a few minutes on two CPU cores"),
                ("steppe compare my_project:task --methods base sam asam", "a task of your own"),
                ("steppe compare --epochs 10 --json > result.json", "the result for a script"),
            ),
            "[RECIPE | package.module:task] [OPTIONS]",
        ),
        "finetune": Verb(
            Finetune,
            _FINETUNE,
            _FINETUNE_DETAILS,
            (
                ("steppe finetune --shots 10", "ten images of each class"),
                ("steppe finetune --backbone timm:resnet18.a1_in1k", "a checkpoint of timm, by its name"),
            ),
        ),
        "tune": Verb(
            Tune,
            _TUNE,
            _TUNE_DETAILS,
            (
                ("steppe tune", "the rho of SAM, on the demo"),
                ("steppe tune demo --search rho=0.01..1 lr=0.01..0.2", "rho and the learning rate"),
                ("steppe tune my_project:task --methods sam asam --trials 30", "two methods, on a task of your own"),
            ),
            "[RECIPE | package.module:task] [OPTIONS]",
        ),
        "measure": Verb(
            Measure,
            _MEASURE,
            _MEASURE_DETAILS,
            (
                ("steppe measure runs/demo", "all runs of a comparison"),
                ("steppe measure --model my_project:net --weights a.pt --data my_project:data", "any model"),
            ),
            "[FOLDER] [OPTIONS]",
        ),
        "plot": Verb(
            Plot,
            _PLOT,
            "",
            (("steppe plot runs/demo", "after runs were added, copied or removed"),),
            "FOLDER [OPTIONS]",
        ),
        "methods": Verb(
            Methods,
            _METHODS,
            "Names or labels may have wildcards: gsam, '*sam', 'Late*'. One method's name shows its card; nothing "
            "lists all.",
            (
                ("steppe methods", "the table of all methods"),
                ("steppe methods gsam", "the card of one"),
                ("steppe methods 'look*' sam --bibtex", "what to cite"),
            ),
            "[NAME ...] [OPTIONS]",
        ),
    }
)
"""The commands by their names."""

CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)


def parse(words: Sequence[str]) -> Command:
    """Turn the words of a command line into a command.

    Raises SystemExit: with 2 after saying what was meant when it does not understand.
    """
    commands: Any = Union[  # noqa: UP007  # made at run time
        tuple(
            Annotated[verb.kind, tyro.conf.subcommand(name, description=verb.summary)] for name, verb in VERBS.items()
        )
    ]
    command: Command = tyro.cli(
        commands, prog="steppe", args=_said_open(_with_task(words)), registry=REGISTRY, config=CONFIG
    )
    return command


def _with_task(words: Sequence[str]) -> list[str]:
    """Let a task be named in the place of a recipe: `compare package.module:task` is `compare task --task ...`.

    >>> _with_task(["compare", "my_project.flowers:task", "--seeds", "5"])
    ['compare', 'task', '--task', 'my_project.flowers:task', '--name', 'flowers', '--seeds', '5']
    """
    verb, place, rest = list(words[:1]), "".join(words[1:2]), list(words[2:])
    if verb not in (["compare"], ["tune"]) or ":" not in place or place.startswith("-"):
        return list(words)
    named = [] if any(word.split("=")[0] == "--name" for word in rest) else ["--name", name_of_task(place)]
    return [*verb, "task", "--task", place, *named, *rest]


def _said_open(words: Sequence[str]) -> list[str]:
    """Let options that may be left open be said like those that may not: --amp for --amp True, --no-amp for False."""
    said = list[str]()
    for place, word in enumerate(words):
        after = "".join(words[place + 1 : place + 2])
        name = word.replace("_", "-").removeprefix("--no-").removeprefix("--")
        if name in OPEN and word.startswith("--") and after not in ("None", "True", "False"):
            said += [f"--{name}", str(not word.startswith("--no-"))]
        else:
            said.append(word)
    return said


def about(method: Method) -> str:
    """Return what a method is, with the names of its arguments, for the help."""
    return method.summary + (f" ({', '.join(method.arguments)})" if method.arguments else "")
