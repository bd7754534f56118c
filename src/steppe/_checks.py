"""Range checks of numbers that a user gives: the error names the value and its meaning.

A number out of range and a count that is not whole are a ValueError; what is no number at all is a TypeError where a
fraction would do.
"""

import math
from numbers import Integral, Real
from typing import Any


def check_finite(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless -inf < value < inf."""
    _check_number(name, value, meaning)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}: it is {meaning}")


def check_nonnegative(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 <= value < inf."""
    _check_number(name, value, meaning)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}: it is {meaning}")


def check_positive(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 < value < inf."""
    _check_number(name, value, meaning)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and more than 0, got {value}: it is {meaning}")


def check_unit_interval(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    _check_number(name, value, meaning)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}: it is {meaning}")


def check_open_unit_interval(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 < value < 1."""
    _check_number(name, value, meaning)
    if not 0 < value < 1:
        raise ValueError(f"{name} must be more than 0 and less than 1, got {value}: it is {meaning}")


def check_below_one(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    _check_number(name, value, meaning)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {value}: it is {meaning}")


def check_positive_share(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    _check_number(name, value, meaning)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be more than 0 and at most 1, got {value}: it is {meaning}")


def check_count(name: str, value: int, meaning: str, *, at_least: int = 1) -> None:
    """Raise ValueError unless the value is a whole number, large enough; a fraction or NaN would never be reached."""
    check_whole(name, value, meaning)
    if value < at_least:
        raise ValueError(f"{name} must be {at_least} or more, got {value}: it is {meaning}")


def check_whole(name: str, value: Any, meaning: str) -> None:
    """Raise ValueError unless the value is a whole number, of the type int or one like it (numpy's)."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, an int, got {value!r}: it is {meaning}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed is a whole number: None would be a seed as well, the same in every run."""
    check_whole("seed", seed, "the seed of the random numbers")


def _check_number(name: str, value: Any, meaning: str) -> None:
    """Raise TypeError unless the value is a real number; True is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}: it is {meaning}")
