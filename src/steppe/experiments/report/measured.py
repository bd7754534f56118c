"""What `steppe measure` has left in a run folder: flatness.json of each run, and the one that compares contenders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steppe.experiments.errors import ExperimentError
from steppe.experiments.folder import RunFolder
from steppe.experiments.measure import FLATNESS
from steppe.experiments.recipes import Recipe, Unit
from steppe.experiments.statistics import Estimate, estimate
from steppe.flatness import FAMILIES, Family
from steppe.flatness.measure import FORMAT

__all__ = ["Flatness", "read"]


@dataclass(frozen=True)
class Flatness:
    """All that was measured. `verdicts` is by contender; both parts may be empty, one without the other too."""

    units: Mapping[Unit, Mapping[str, Any]]
    verdicts: Mapping[str, Mapping[str, Any]]
    lines: Sequence[Mapping[str, Any]]
    text: Sequence[str]

    def families(self) -> list[Family]:
        """The families, with the measures that there are."""
        there = {name for values in self.units.values() for name in values.get("measures", {})}
        found = (
            replace(family, measures={k: label for k, label in family.measures.items() if k in there})
            for family in FAMILIES.values()
        )
        return [family for family in found if family.measures]

    def values(self, method: str, name: str) -> list[float]:
        """A measure of each of a contender's runs, where it is a number."""
        return [
            value
            for unit in self.units
            if unit.method == method and (value := self.value(unit, name)) is not None and math.isfinite(value)
        ]

    def value(self, unit: Unit, name: str) -> float | None:
        """A measure of one run."""
        value = self.units[unit].get("measures", {}).get(name, {}).get("value")
        return None if value is None else float(value)

    def estimate(self, method: str, name: str) -> Estimate | None:
        """Mean and standard deviation over a contender's runs; None where it has none."""
        values = self.values(method, name)
        return estimate(values) if values else None

    def difference(self, method: str, name: str) -> Mapping[str, Any] | None:
        """What a contender's verdict says of a measure."""
        measures = self.verdicts.get(method, {}).get("measures", [])
        return next((measure for measure in measures if measure["name"] == name), None)


def read(folder: RunFolder, recipe: Recipe) -> Flatness:
    """Read what there is; ExperimentError when a file is damaged."""
    units = {unit: _read(folder.unit(unit) / FLATNESS) for unit in recipe.units()}
    whole = _read(folder.path / FLATNESS)
    verdicts = {str(verdict["method"]): verdict for verdict in whole.get("verdicts", [])}
    return Flatness({u: v for u, v in units.items() if v}, verdicts, whole.get("lines", []), whole.get("text", []))


def _read(path: Path) -> dict[str, Any]:
    """One file; nothing where there is none."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
        if values.get("format", FORMAT) != FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
    except ValueError as error:
        raise ExperimentError(
            f"{path} is damaged or of another version ({error}), and the page would leave out what it says: delete it "
            "and run `steppe measure` on the folder again"
        ) from error
    return values
