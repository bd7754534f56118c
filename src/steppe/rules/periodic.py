"""The cadence of SAM: perturb at every step, or at every k-th."""

from dataclasses import dataclass
from typing import ClassVar

from steppe.rules.protocols import Point


@dataclass(frozen=True)
class Periodic:
    """Climb at the steps 0, k, 2k, ...; the others are plain steps of the base. A step costs 1 + 1/k passes.

    >>> [Periodic(3)(Point([], [], rho=[], base_state=[], step=step)) for step in range(5)]
    [True, False, False, True, False]
    """

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    k: int = 1
    """k, the interval in steps; 1 is SAM."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be 1 or more, got {self.k}: the climb comes at every k-th step")

    def __call__(self, point: Point) -> bool:
        return point.step % self.k == 0
