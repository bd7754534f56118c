"""Range checks of hyperparameters: the error names the value and its meaning."""

import math


def check_nonnegative(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 <= value < inf."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}: it is {meaning}")


def check_positive(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 < value < inf."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and more than 0, got {value}: it is {meaning}")


def check_unit_interval(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}: it is {meaning}")


def check_below_one(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {value}: it is {meaning}")


def check_positive_share(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be more than 0 and at most 1, got {value}: it is {meaning}")


def check_count(name: str, value: int, meaning: str) -> None:
    """Raise ValueError unless value >= 1."""
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}: it is {meaning}")
