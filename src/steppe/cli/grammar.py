"""The commands, their options and the recipes, for the help, the completion and typos, without PyTorch.

They are read from commands.json, which scripts/make_command_line.py writes from :mod:`steppe.experiments.commands`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

_FILE = Path(__file__).with_name("commands.json")


@dataclass(frozen=True)
class Option:
    """An option, by the words that name it."""

    names: tuple[str, ...]
    """("--lr",), or ("--freeze", "--no-freeze") for one that takes no value."""
    help: str
    value: str = ""
    """What follows it, FLOAT or {auto,cpu,cuda}; empty for an option that takes no value."""
    default: str = ""
    choices: tuple[str, ...] = ()
    many: bool = False
    """True if several values may follow."""


@dataclass(frozen=True)
class Section:
    """Options with a common heading."""

    title: str
    about: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Command:
    """A command."""

    name: str
    usage: str
    """What follows its name."""
    summary: str
    details: str
    examples: tuple[tuple[str, str], ...]
    """Commands, and what each does."""
    sections: tuple[Section, ...]
    takes_recipe: bool = False
    values: tuple[str, ...] = field(default=())
    """What may stand after the command, if that is known."""
    takes_folder: bool = False

    @property
    def options(self) -> Iterator[Option]:
        """The options of all sections."""
        for section in self.sections:
            yield from section.options

    def option(self, word: str) -> Option | None:
        """Return the option of a word, `--lr`, `--lr=0.1` or `--batch_size`; None if there is none."""
        name = name_of(word)
        return next((option for option in self.options if name in option.names), None)


@dataclass(frozen=True)
class Recipe:
    """A recipe of `steppe compare`, and the options in which it differs from the usual ones."""

    name: str
    summary: str
    defaults: Mapping[str, str]


@dataclass(frozen=True)
class Grammar:
    """The whole command line."""

    summary: str
    commands: Mapping[str, Command]
    recipes: Mapping[str, Recipe]
    methods: Mapping[str, str]
    """The methods of `--methods`, and what each is."""

    @property
    def default_recipe(self) -> str:
        """The recipe of a command that names none: the first one."""
        return next(iter(self.recipes))


JSON = Option(("--json",), "Print one JSON document on stdout, and everything else on stderr.")
_OPTIONS = Section("options", "", (JSON,))

SHELLS = ("bash", "zsh", "fish")

RECIPES = Command(
    "recipes",
    "[RECIPE ...]",
    "List the recipes of `steppe compare` and `steppe tune`; of those that are named, the options too.",
    "A recipe is a comparison with all its options; every one can be set on the command line. `steppe compare demo "
    "--help` explains them.",
    (("steppe recipes", "all recipes"), ("steppe recipes article --json", "the options of one, for a script")),
    (_OPTIONS,),
)
COMPLETION = Command(
    "completion",
    "{bash,zsh,fish}",
    "Print the script that lets a shell complete commands, recipes, methods and options with the Tab key.",
    'bash, in ~/.bashrc: eval "$(steppe completion bash)"\n\n'
    'zsh, in ~/.zshrc after compinit: eval "$(steppe completion zsh)"\n\n'
    "fish, once: steppe completion fish > ~/.config/fish/completions/steppe.fish",
    (('eval "$(steppe completion bash)"', "for this session of bash"),),
    (),
    values=SHELLS,
)
LIGHT = MappingProxyType({command.name: command for command in (RECIPES, COMPLETION)})
"""The commands that need no PyTorch, and run in :mod:`steppe.cli`."""


def name_of(word: str) -> str:
    """Return the name of an option, as it is listed.

    >>> name_of("--batch_size=16")
    '--batch-size'
    """
    return word.partition("=")[0].replace("_", "-")


@cache
def grammar() -> Grammar:
    """Read commands.json."""
    return parse(json.loads(_FILE.read_text("utf-8")))


def parse(values: Mapping[str, Any]) -> Grammar:
    """Make the grammar from the content of commands.json."""
    sections = {name: _section(name, section) for name, section in values["sections"].items()}
    recipes = {name: Recipe(name, **recipe) for name, recipe in values["recipes"].items()}
    commands = {name: _command(name, command, sections) for name, command in values["commands"].items()}
    commands |= {"recipes": _with_values(RECIPES, tuple(recipes)), "completion": COMPLETION}
    return Grammar(values["summary"], commands, recipes, values["methods"])


def _section(name: str, values: Mapping[str, Any]) -> Section:
    options = []
    for option in values["options"]:
        rest = {key: value for key, value in option.items() if key not in ("names", "choices")}
        options.append(Option(names=tuple(option["names"]), choices=tuple(option.get("choices", ())), **rest))
    return Section(name, values["about"], tuple(options))


def _command(name: str, values: Mapping[str, Any], sections: Mapping[str, Section]) -> Command:
    examples = tuple((command, what) for command, what in values["examples"])
    found = tuple(sections[one] for one in values["sections"])
    if found and found[-1].title == _OPTIONS.title:
        found = (*found[:-1], Section(_OPTIONS.title, "", (*found[-1].options, JSON)))
    else:
        found = (*found, _OPTIONS)
    rest = {key: values[key] for key in ("usage", "summary", "details", "takes_recipe", "takes_folder")}
    return Command(name, examples=examples, sections=found, values=tuple(values["values"]), **rest)


def _with_values(command: Command, values: tuple[str, ...]) -> Command:
    return Command(**vars(command) | {"values": values})


def default_of(option: Option, recipe: Recipe | None) -> str:
    """Return the value of an option that is not given, in a recipe or without one."""
    return option.default if recipe is None else recipe.defaults.get(option.names[0], option.default)


def takes_recipe(words: Sequence[str]) -> bool:
    """True if the words begin with a command after which a recipe, or a task, may stand."""
    command = grammar().commands.get(words[0]) if words else None
    return command is not None and command.takes_recipe


def names_recipe(words: Sequence[str]) -> bool:
    """True if a recipe, or a task, stands after such a command.

    >>> names_recipe(["compare", "article"]), names_recipe(["compare", "--seeds", "5"]), names_recipe(["plot", "runs"])
    (True, False, False)
    """
    return takes_recipe(words) and len(words) > 1 and not words[1].startswith("-")


def recipe_of(words: Sequence[str]) -> str | None:
    """Return the recipe that words of a command line name; None where there is none.

    >>> recipe_of(["compare", "my_project:task", "--seeds", "5"]), recipe_of(["plot", "runs/demo"])
    ('task', None)
    """
    if words[:1] == ["finetune"]:
        return "finetune"
    if not names_recipe(words):
        return None
    return "task" if ":" in words[1] else words[1]
