"""Range checks for the sections of a recipe; each error names the field, its value and its meaning."""

import math
from collections.abc import Mapping


def at_least(section: object, limits: Mapping[str, tuple[float, str]]) -> None:
    """Raise ValueError for a field below its limit; `limits` maps field names to (limit, meaning)."""
    for name, (limit, meaning) in limits.items():
        value = getattr(section, name)
        if value is not None and not (math.isfinite(value) and value >= limit):
            raise ValueError(f"{name}={value}: {meaning}, must be a finite number of at least {limit}")


def positive(name: str, value: float | None, meaning: str) -> None:
    """Raise ValueError unless `value` is None or a finite number above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value}: {meaning} must be a finite number above 0")
