"""Results of trainings as the comparisons that they are: for the tables and figures of `steppe compare`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from presets.method import register
from results import Result
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.storage.records import Record
from steppe.flatness import Flatness


@dataclass(frozen=True)
class Comparison:
    """All seeds of a recipe that were trained on a device."""

    recipe: Recipe
    results: Mapping[Run, list[Record]]
    flatness: Mapping[tuple[Run, int], Flatness]
    """By run and standardized epoch."""
    failed: Sequence[str]
    """What could not be trained or measured, and why."""


def comparison(found: Sequence[Result], way: str = "") -> Comparison:
    """Put the results of one device together: they differ by their seeds."""
    register()
    runs = [run for result in found for run in result.data["runs"] if run["way"] == way]
    seeds = sorted({run["seed"] for run in runs})
    recipe = Recipe.from_json(found[0].data["recipes"][way])
    recipe = replace(recipe, first_seed=seeds[0], seeds=len(seeds))
    results, flatness, failed = {}, {}, []
    for run in runs:
        run = Run(recipe, run["method"], run["seed"])
        if "failed" in run:
            failed.append(f"{run.name}: {run['failed']}")
        else:
            results[run] = [Record(**record) for record in run["records"]]
        for epoch, measured in run.get("flatness", {}).items():
            if "failed" in measured:
                failed.append(f"flatness of {run.name} after {epoch} standardized epochs: {measured['failed']}")
            else:
                flatness[run, int(epoch)] = Flatness.from_json(measured)
    return Comparison(recipe, results, flatness, failed)


def by_device(found: Sequence[Result]) -> list[list[Result]]:
    """Results of several names, together where they are of one device."""
    devices: dict[str, list[Result]] = {}
    for result in found:
        devices.setdefault(result.device, []).append(result)
    return list(devices.values())


def told(found: Sequence[Result]) -> str:
    """How it was trained, and how long that took."""
    data: Mapping[str, Any] = found[0].data
    recipe = Recipe.from_json(next(iter(data["recipes"].values())))
    switches = {
        "float32": not recipe.amp,
        "bfloat16": recipe.amp,
        "channels-last": recipe.channels_last,
        "compiled": recipe.compile,
        "CUDA graphs where the method allows it": recipe.cuda_graphs,
    }
    ways = ", ".join(name for name, on in switches.items() if on) if len(data["recipes"]) == 1 else "both precisions"
    wall = sum(result.data["wall"] for result in found) / 60
    fewer = f" Only {data['fewer']}." if data["fewer"] else ""
    return f"Trained with {ways}; all runs together took {wall:.0f} minutes, with measuring.{fewer}"
