"""`steppe recipes`: the recipes, and the options in which each differs from the usual ones."""

import json
from collections.abc import Iterator, Sequence

from steppe.cli.grammar import Recipe, default_of, grammar
from steppe.cli.help_text import entry


def as_text(names: Sequence[str]) -> str:
    """Return the recipes of these names with their options, or a list of all."""
    lines = list[str]()
    for recipe in _named(names):
        lines += entry(recipe.name, recipe.summary)
        if names:
            lines += (f"    {option} {value}".rstrip() for option, value in _options(recipe) if value)
    return "\n".join(lines) + "\n"


def as_json(names: Sequence[str]) -> str:
    """Return the recipes of these names, or all, with all of their options as the command line takes them."""
    found = [
        {"name": recipe.name, "summary": recipe.summary, "options": dict(_options(recipe))} for recipe in _named(names)
    ]
    return json.dumps({"recipes": found}, indent=2) + "\n"


def _named(names: Sequence[str]) -> list[Recipe]:
    return [recipe for recipe in grammar().recipes.values() if not names or recipe.name in names]


def _options(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for option in grammar().commands["compare"].options:
        if option.names[0] not in ("--json", "--name"):
            yield option.names[0], default_of(option, recipe)
