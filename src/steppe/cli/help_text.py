"""The help, as plain text that fits the terminal, or 80 columns elsewhere."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator

from steppe.cli.grammar import Command, Grammar, Option, Recipe, default_of

_LEFT = 26  # columns for the names of options
_WIDEST = 100


def width() -> int:
    """Return the columns to fill: those of the terminal or of $COLUMNS, else 80."""
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, _WIDEST))


def overview(grammar: Grammar) -> str:
    """Return the help of `steppe` alone."""
    lines = ["usage: steppe COMMAND [OPTIONS]", "", *_paragraphs(grammar.summary), "", "commands:"]
    for command in grammar.commands.values():
        lines += entry(command.name, command.summary)
    lines += ["", "options:", *entry("-h, --help", "Explain this, or a command: steppe compare --help.")]
    lines += [*entry("-V, --version", "Print the version."), "", "examples:"]
    for command in grammar.commands.values():
        lines += [f"  {example}" for example, _ in command.examples[:1]]
    lines += ["", *_paragraphs(_EXIT_CODES)]
    return "\n".join(lines) + "\n"


_EXIT_CODES = (
    "Exit codes: 0 success; 1 an error, printed in one line on stderr; 2 a wrong command line; 130 Ctrl-C, after which "
    "the same command goes on where it stopped."
)


def of_command(grammar: Grammar, command: Command) -> str:
    """Return the help of a command: of one that takes a recipe, without the options of a recipe."""
    lines = [f"usage: steppe {command.name} {command.usage}".rstrip(), "", *_paragraphs(command.summary)]
    if command.takes_recipe:
        lines += ["", "recipes, the first one by default:"]
        for recipe in grammar.recipes.values():
            lines += entry(recipe.name, recipe.summary)
    if command.details:
        lines += ["", *_paragraphs(command.details)]
    if command.name == "compare":
        for name, about in grammar.methods.items():
            lines += _wrapped(f"{name}: {about}", "  ", "      ")
    if command.takes_recipe:
        asked = f"`steppe {command.name} {grammar.default_recipe} --help`"
        lines += ["", *_paragraphs(f"{asked} explains the options.")]
    else:
        lines += _sections(command, None)
    return "\n".join([*lines, *_examples(command)]) + "\n"


def of_recipe(command: Command, recipe: Recipe) -> str:
    """Return the help of a command with a recipe: its options, with the recipe's values."""
    named = "" if command.name == recipe.name else f" {recipe.name}"
    lines = [f"usage: steppe {command.name}{named} [OPTIONS]", ""]
    lines += _paragraphs(recipe.summary if command.takes_recipe else command.summary)
    if not command.takes_recipe:
        lines += ["", *_paragraphs(command.details)]
    lines += _sections(command, recipe)
    return "\n".join([*lines, *_examples(command)]) + "\n"


def _sections(command: Command, recipe: Recipe | None) -> Iterator[str]:
    for section in command.sections:
        yield from ("", f"{section.title}:")
        yield from _wrapped(section.about, "  ", "  ")
        for option in section.options:
            yield from _option(option, default_of(option, recipe))
    if not command.sections:
        yield from ("", "options:")
    yield from entry("-h, --help", "Print this.")


def _option(option: Option, default: str) -> Iterator[str]:
    names = ", ".join(option.names)
    value = "{" + ",".join(option.choices) + "}" if option.choices else option.value
    value += " ..." if option.many else ""
    left = f"{names} {value}".rstrip()
    if len(left) + 2 > width() and option.choices:  # too many to stand beside each other
        left = f"{names} NAME"
        listed = f" One of {', '.join(option.choices)}."
    else:
        listed = ""
    default = {"True": "yes", "False": "", "None": ""}.get(default, default)
    shown = f" (default: {default})" if default else ""
    yield from entry(left, f"{option.help}{listed}{shown}")


def entry(name: str, text: str) -> Iterator[str]:
    """Yield a name and its text beside it, or below a long name."""
    indent = " " * _LEFT
    lines = _wrapped(text, indent, indent) or [""]
    if len(name) + 4 > _LEFT:
        yield f"  {name}"
    else:
        lines[0] = f"  {name}".ljust(_LEFT) + lines[0][_LEFT:]
    yield from (line.rstrip() for line in lines)


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        text,
        width(),
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,  # nor names of options, at their hyphens
        break_on_hyphens=False,
    )


def _paragraphs(text: str) -> list[str]:
    """Wrap paragraphs, which a blank line separates."""
    parts = (_wrapped(" ".join(part.split()), "", "") for part in text.strip().split("\n\n"))
    return _joined(parts)


def _joined(parts: Iterable[list[str]]) -> list[str]:
    lines = list[str]()
    for part in parts:
        lines += ["", *part] if lines else part
    return lines


def _examples(command: Command) -> Iterator[str]:
    yield from ("", "examples:")
    for example, what in command.examples:
        yield from _wrapped(f"# {what}", "  ", "  # ")
        yield f"  {example}"
