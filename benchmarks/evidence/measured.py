"""The saved results of a recipe: its settings may have been measured on different days and on different machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import results
from evidence.recipes import EVIDENCE


@dataclass(frozen=True)
class Measured:
    """The results of a recipe, one for each device."""

    recipe: str
    found: Sequence[results.Result]

    @classmethod
    def load(cls, recipe: str, folder: Path = results.RESULTS) -> "Measured":
        """Read the results of a recipe."""
        return cls(recipe, results.load(file_name(recipe), folder))

    def __bool__(self) -> bool:
        return bool(self.settings)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What was found in each setting, in the recipe's order."""
        return {name: result.data["settings"][name] for name, result in self._measured_by.items()}

    @property
    def searches(self) -> Mapping[str, Any]:
        """The searches of settings that are not confirmed yet."""
        return {name: one for result in self.found for name, one in result.data.get("searches", {}).items()}

    @property
    def side_by_side(self) -> Mapping[str, Any]:
        """The settings that one table shows side by side."""
        return {name: self.settings[name] for name in EVIDENCE[self.recipe].side_by_side if name in self.settings}

    @property
    def others(self) -> Mapping[str, Any]:
        """The settings with controls and a figure."""
        return {name: found for name, found in self.settings.items() if name not in self.side_by_side}

    @property
    def source(self) -> str:
        """Device, versions, date and command; a line for each group of settings that differ in these."""
        groups: dict[str, list[str]] = {}
        for name, result in self._measured_by.items():
            dated = replace(result, date=result.data["settings"][name]["date"])
            groups.setdefault(dated.source, []).append(name)
        if len(groups) == 1:
            return next(iter(groups))
        return "\n".join(f"- {'; '.join(names)}: {source}" for source, names in groups.items())

    @cached_property
    def _measured_by(self) -> Mapping[str, results.Result]:
        return {
            name: result
            for name in EVIDENCE[self.recipe].settings
            for result in self.found
            if name in result.data["settings"]
        }


def file_name(recipe: str) -> str:
    """Return the name of the files of a recipe's results."""
    return f"evidence_{recipe.replace('-', '_')}"
