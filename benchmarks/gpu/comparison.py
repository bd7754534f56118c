"""Turn the results of trainings into comparisons, for the tables and figures of `steppe compare`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from presets.method import register
from results import Result
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.storage.records import Record, parse_records
from steppe.flatness import Flatness


@dataclass(frozen=True)
class Comparison:
    """All seeds of a recipe trained on one device."""

    recipe: Recipe
    records: Mapping[Run, list[Record]]
    flatness: Mapping[tuple[Run, int], Flatness]
    """Flatness by run and standardized epoch."""
    failures: Sequence[str]
    """The reason for each run that failed, and for each failed measurement of flatness."""


def comparison(found: Sequence[Result], setting: str = "") -> Comparison:
    """Combine the results of one device, which differ by their seeds."""
    register()
    outcomes = [outcome for result in found for outcome in result.data["runs"] if outcome["setting"] == setting]
    seeds = sorted({outcome["seed"] for outcome in outcomes})
    recipe = Recipe.from_json(found[0].data["recipes"][setting])
    recipe = recipe.replace(first_seed=seeds[0], seeds=len(seeds))
    methods = {str(method): method for method in [*recipe.comparison.methods, *recipe.controls()]}
    records, flatness, failures = {}, {}, []
    for outcome in outcomes:
        run = Run(recipe, methods[outcome["method"]], outcome["seed"])
        if "failed" in outcome:
            failures.append(f"{run.name}: {outcome['failed']}")
        else:
            records[run] = parse_records(outcome["records"])
        for epoch, measured in outcome.get("flatness", {}).items():
            if "failed" in measured:
                failures.append(f"flatness of {run.name} after {epoch} standardized epochs: {measured['failed']}")
            else:
                flatness[run, int(epoch)] = Flatness.from_json(measured)
    return Comparison(recipe, records, flatness, failures)


def description(found: Sequence[Result]) -> str:
    """Describe how the runs were trained, and how long that took."""
    data: Mapping[str, Any] = found[0].data
    recipe, *others = map(Recipe.from_json, data["recipes"].values())
    switches = {
        "float32": not recipe.hardware.amp,
        "bfloat16": recipe.hardware.amp,
        "channels-last": recipe.hardware.channels_last,
        "compiled": recipe.hardware.compile,
        "CUDA graphs where the method allows it": recipe.hardware.cuda_graphs and recipe.training.is_constant,
    }
    used = ", ".join(name for name, on in switches.items() if on)
    if any(other.hardware.amp != recipe.hardware.amp for other in others):
        used = "both precisions"
    minutes = sum(result.data["seconds"] for result in found) / 60
    fewer = f" Only {data['fewer_epochs']}." if data["fewer_epochs"] else ""
    return f"Trained with {used}; all runs together took {minutes:.0f} minutes, including measurements.{fewer}"
