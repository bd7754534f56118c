"""Wrong command lines, found before PyTorch is loaded; each message names the closest word that there is."""

import itertools
from collections.abc import Sequence

from steppe.cli.grammar import LIGHT, Command, grammar, name_of, names_recipe
from steppe.experiments.errors import closest

_HELP = ("-h", "--help")
_NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}
_RENAMED = {"--tensorboard": "--log tensorboard"}


def check(words: Sequence[str]) -> str | None:
    """Return the message on a command, a recipe, an option or a choice that there is not, or None."""
    known = grammar()
    if not words:
        return f"name a command, one of {', '.join(known.commands)}; `steppe --help` explains them"
    first, *rest = words
    if first.startswith("-"):
        return (
            None
            if first in (*_HELP, "-V", "--version")
            else _unknown_option("steppe", "", first, [*_HELP, "--version"])
        )
    if first not in known.commands:
        return f"there is no command {first!r}{closest(first, known.commands)} `steppe --help` lists the commands"
    command = known.commands[first]
    if names_recipe(words):
        name = rest[0]
        if name not in known.recipes and ":" not in name:  # package.module:function is a task of the user's own
            close = closest(name, known.recipes)
            own = "" if "?" in close else " A task of your own is package.module:name."
            return f"there is no recipe {name!r}{close}{own} `steppe {first} --help` lists the recipes"
    elif command.name in LIGHT:
        for word in rest:
            if not word.startswith("-") and word not in command.values:
                close = closest(word, command.values)
                return f"{first}: there is no {word!r}{close} `steppe {first} --help` explains it"
        if command.name == "completion" and not rest:
            return f"completion: name the shell, one of {', '.join(command.values)}"
    return _check_options(command, words)


def _check_options(command: Command, words: Sequence[str]) -> str | None:
    called = command.name
    if command.takes_recipe:  # its options are listed with a recipe
        called += f" {words[1] if names_recipe(words) else grammar().default_recipe}"
    for place, word in enumerate(words):
        if not word.startswith("--") or word == "--help":
            continue
        option = command.option(word)
        if option is None:
            names = [name for option in command.options for name in option.names]
            return _unknown_option(command.name, called, word, names)
        given = [word.partition("=")[2]] if option.value and "=" in word else []
        if option.many and not given:
            given = list(itertools.takewhile(lambda value: not value.startswith("-"), words[place + 1 :]))
        elif option.value and not given:
            given = list(words[place + 1 : place + 2])
            if not given or given[0].startswith("--"):
                return f"{word} needs a value, {option.value}: `steppe {called} --help` explains it"
        for value in given:
            if option.choices and value not in option.choices:
                return (
                    f"{option.names[0]}: {value!r} is unknown{closest(value, option.choices)} Known: "
                    f"{', '.join(option.choices)}"
                )
            if option.value in _NUMBERS and not _is_number(value, option.value):
                return f"{option.names[0]}: {value!r} is not {_NUMBERS[option.value]}"
    return None


def _is_number(text: str, kind: str) -> bool:
    try:
        int(text) if kind == "INT" else float(text)
    except ValueError:
        return text == "None"  # what an option is that may be left open
    return True


def _unknown_option(command: str, called: str, word: str, known: Sequence[str]) -> str:
    name = name_of(word)
    close = f"; it is now {_RENAMED[name]}." if name in _RENAMED else closest(name, known)
    asked = " ".join(["steppe", *called.split(), "--help"])
    return f"{command} has no option {name}{close} `{asked}` lists the options"
