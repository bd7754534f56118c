"""Write src/steppe/cli/commands.json, from which `steppe --help` and the completion are made without PyTorch.

    python scripts/make_command_line.py            write it
    python scripts/make_command_line.py --check    write nothing; exit 1 if it is stale

The commands and their options are those of steppe.experiments.commands, as tyro reads them.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from measured_parts import write_pages
from steppe.experiments.commands import CONFIG, OPEN, REGISTRY, VERBS, about
from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.user_model import UserModel
from steppe.experiments.tuning.options import TuningOptions

FILE = Path(__file__).parents[1] / "src" / "steppe" / "cli" / "commands.json"
SUMMARY = "Sharpness-aware minimization: the experiments. Begin with `steppe compare`."
_DEFAULT = re.compile(r" ?\(default: (?P<value>.*)\)$", re.DOTALL)
_FIRST = ("comparison", "training", "data", "model")  # what is set most often


@dataclass(frozen=True)
class _Methods:
    """The output."""

    bibtex: bool = False
    """Print the BibTeX of what they use."""


@dataclass(frozen=True)
class _Run:
    """A recipe and what trains it."""

    recipe: Recipe = field(default_factory=Recipe)
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)


@dataclass(frozen=True)
class _Measuring:
    """What `steppe measure` has."""

    measurement: MeasuringOptions = field(default_factory=MeasuringOptions)
    model: UserModel = field(default_factory=UserModel)


@dataclass(frozen=True)
class _Search:
    """What `steppe tune` has beside a run."""

    search: TuningOptions = field(default_factory=TuningOptions)


def sections(kind: Any, default: Any = None) -> dict[str, dict[str, Any]]:
    """Return the options of a dataclass, by the fields that they belong to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there is no other way to tyro's parser
        parser = tyro.extras.get_parser(kind, default=default or kind(), registry=REGISTRY, config=CONFIG)
    found = dict[str, dict[str, Any]]()
    for group in parser._action_groups:
        options = [_option(action) for action in group._group_actions if "--help" not in action.option_strings]
        if options:
            title = str(group.title).removesuffix(" options").rpartition(".")[2].replace("_", " ")
            found[title] = {"about": " ".join(str(group.description or "").split()), "options": options}
    return found


def _option(action: argparse.Action) -> dict[str, Any]:
    text = " ".join(str(action.help).replace("%%", "%").split())
    default = found["value"] if (found := _DEFAULT.search(text)) else ""
    names = [name for name in action.option_strings if name.startswith("--")]
    open_ = names[0].removeprefix("--") in OPEN
    choices = [] if open_ or action.choices is None else [str(choice) for choice in action.choices]
    value = re.sub(r"^\{None\}\|", "", str(action.metavar or "").replace("{None,True,False}", ""))
    many = action.nargs in ("*", "+")
    if many:
        value = re.sub(r"^\[|\s.*$", "", value)
        if value.startswith("{"):
            choices = value.strip("{}").split(",")
    values: dict[str, Any] = {
        "names": [names[0], f"--no-{names[0][2:]}"] if open_ else names,
        "help": _DEFAULT.sub("", text),
        "value": "" if open_ or action.nargs == 0 else value,
        "default": "" if default in ("None", "''") else default,
        "choices": choices,
        "many": many,
    }
    return {name: value for name, value in values.items() if value or name == "help"}


def grammar() -> dict[str, Any]:
    """Return the content of the file."""
    usual = sections(_Run)
    order = [*_FIRST, *(name for name in usual if name not in _FIRST)]
    run = {name: usual[name] for name in order}
    run["output"]["options"] = run.pop("recipe")["options"] + run["output"]["options"]  # the name is a folder's
    search, measuring, output = sections(_Search), sections(_Measuring), sections(_Methods)
    measuring["model to measure"] = measuring.pop("model")
    of_commands = {
        "compare": [*run],
        "finetune": [*run],
        "tune": [*search, *run],
        "measure": [*measuring],
        "plot": [],
        "methods": [*output],
    }
    assert of_commands.keys() == VERBS.keys()
    defaults = dict(_defaults(run))
    recipes = {}
    for name, (recipe, summary) in RECIPES.items():
        own = dict(_defaults(sections(_Run, _Run(recipe))))
        recipes[name] = {
            "summary": summary,
            "defaults": {option: own[option] for option in own if own[option] != defaults[option]},
        }
    commands = {
        name: {
            "usage": verb.usage,
            "summary": verb.summary,
            "details": verb.details.strip(),
            "examples": verb.examples,
            "sections": of_commands[name],
            "takes_recipe": name in ("compare", "tune"),
            "takes_folder": name in ("measure", "plot"),
            "values": [],
        }
        for name, verb in VERBS.items()
    }
    return {
        "generated": "by scripts/make_command_line.py",
        "summary": SUMMARY,
        "commands": commands,
        "sections": search | run | measuring | output,
        "recipes": recipes,
        "methods": {name: about(method) for name, method in METHODS.items()},
    }


def _defaults(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for section in found.values():
        for option in section["options"]:
            yield option["names"][0], option.get("default", "")


def text() -> str:
    return json.dumps(grammar(), indent=1, ensure_ascii=False) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    return write_pages(words, __file__, __doc__, {FILE: lambda _: text()})


if __name__ == "__main__":
    raise SystemExit(main())
