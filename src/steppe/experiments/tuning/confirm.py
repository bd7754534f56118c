"""Commands that compare the tuned methods on the test set."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe

_RUNS = 3  # the minimum for a verdict


def command_line(recipe: Recipe) -> str:
    name = recipe.name if recipe.name in RECIPES else "demo"
    usual, words = RECIPES[name][0].options(), ["steppe", "compare", name]
    for field, value in recipe.options().items():
        option = field.replace("_", "-")
        if value == usual[field]:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def confirmations(recipe: Recipe, chosen: Sequence[Recipe], names: Sequence[str], path: Path) -> list[str]:
    """Return the commands for the chosen methods on fresh seeds, one for all that have the same options.

    Each recipe of `chosen` has a method at its best values. The searched `names` that are options of a recipe may
    differ from method to method.
    """
    groups: dict[tuple[tuple[str, object], ...], list[MethodSpec]] = {}
    for one in chosen:
        options = tuple((name, value) for name, value in one.options().items() if name in names and name != "rho")
        groups.setdefault(options, []).append(one.comparison.methods[0])
    comparison = recipe.comparison
    commands = []
    for number, (options, methods) in enumerate(groups.items(), 1):
        suffix = "confirmed" if len(groups) == 1 else f"confirmed-{number}"
        confirmed = recipe.replace(
            methods=tuple(dict.fromkeys(methods)),
            out=path.with_name(f"{path.name}-{suffix}"),
            first_seed=comparison.first_seed + comparison.seeds,
            seeds=max(_RUNS, comparison.seeds),
            **dict(options),
        )
        # a comparison of fewer methods may choose another momentum than the search
        if confirmed.base_momentum != chosen[0].base_momentum and "momentum" not in dict(options):
            confirmed = confirmed.replace(momentum=chosen[0].base_momentum)
        commands.append(command_line(confirmed))
    return commands
