"""The cadence of SAM: perturb at every step, or once per interval."""

from dataclasses import dataclass
from typing import ClassVar

from steppe._checks import check_count
from steppe.rules.protocols import Cadence, Point


@dataclass(frozen=True)
class Periodic(Cadence):  # a subclass for the same reason as L2
    """Perturb at the steps 0, k, 2k, ... for an interval of k; the other steps are plain steps of the base.

    A step costs 1 + 1/k passes on average.

    Example:
        >>> [Periodic(interval=3)(Point([], [], rho=[], base_state=[], step=step)) for step in range(5)]
        [True, False, False, True, False]
    """

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    interval: int = 1
    """k, the number of steps from one perturbed step to the next; 1 is SAM."""

    def __post_init__(self) -> None:
        check_count("interval", self.interval, "the number of steps from one perturbed step to the next")

    def __call__(self, point: Point) -> bool:
        return point.step % self.interval == 0
