"""The measured flatness of a run folder: its files, and the verdicts on its methods."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steppe.experiments.analysis.verdicts import Verdict, compared
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.run_folder import RunFolder
from steppe.flatness import Flatness

FLATNESS = "flatness.json"

_UNEQUAL = "These are the ends of all runs, and not of equal compute: {0} after {2} standardized epochs, {1} after {3}."


def read_flatness(folder: RunFolder, recipe: Recipe) -> dict[Run, Flatness]:
    """Read the measures of every run that has some; ExperimentError when a file is damaged."""
    found = {run: read_flatness_file(folder.run(run) / FLATNESS) for run in recipe.runs()}
    return {run: flatness for run, (flatness, _) in found.items() if flatness is not None}


def read_flatness_file(path: Path) -> tuple[Flatness | None, dict[str, Any]]:
    """Read a file of measures, decoded and as JSON; None and an empty dictionary where there is no file.

    Raises:
        ExperimentError: if the file is damaged or not one of `steppe measure`.
    """
    if not path.exists():
        return None, {}
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Flatness.from_json(content), content
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExperimentError(
            f"{path} is damaged, of another version or not of steppe measure ({error}), so its numbers cannot be used: "
            "delete it or move it away, and run steppe measure again"
        ) from error


def read_lines(folder: RunFolder) -> list[dict[str, Any]]:
    """Read the losses on the lines between runs; none if the file is missing or damaged, since they can be remade."""
    try:
        return list(json.loads((folder.path / FLATNESS).read_text())["lines"])
    except (OSError, ValueError, TypeError, KeyError):
        return []


def verdicts(recipe: Recipe, found: Mapping[Run, Flatness]) -> list[Verdict]:
    """Compare the measures of each method with those of the first one, paired by seed.

    Raises:
        ExperimentError: if the runs were measured with different options.
    """
    if len({json.dumps(dict(one.settings), sort_keys=True) for one in found.values()}) > 1:
        raise ExperimentError(
            "these runs were measured in different ways, and their numbers cannot be compared: run steppe measure on "
            "the folder again, with the same options for all"
        )
    reference, *others = recipe.comparison.methods
    made = []
    for method in others:
        runs = [(run, Run(recipe, reference, run.seed)) for run in found if run.method == method]
        pairs = [(found[run], found[other]) for run, other in runs if other in found]
        labels = method.label, reference.label
        ends = [Run(recipe, m, recipe.comparison.first_seed).standardized_epochs for m in (method, reference)]
        further = "" if ends[0] == ends[1] else _UNEQUAL.format(*labels, *ends)
        made.append(compared(str(method), str(reference), labels, pairs, further))
    return [verdict for verdict in made if verdict is not None]
