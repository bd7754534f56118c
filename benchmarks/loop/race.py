"""Methods that are made one by one and then timed in turns; what fails is told, and loses nothing of the others."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from timing import seconds

AscentSteps = Callable[[int], object]
Key = tuple[str, str]
"""The choice and the method."""


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}: {line}"[:200]


@dataclass
class Race:
    """What takes steps, how long they took, and what could not be timed."""

    device: str
    warm: int
    """Steps before the first timing: enough for a graph of each size of batch."""
    chunk: int
    """Steps in a timing."""
    runners: dict[Key, AscentSteps] = field(default_factory=dict)
    warmed: dict[Key, float] = field(default_factory=dict)
    """Seconds from the making to the first timing."""
    times: dict[Key, list[float]] = field(default_factory=dict)
    """Seconds a step, a timing each."""
    failed: dict[Key, str] = field(default_factory=dict)

    def enter(self, makers: Mapping[Key, Callable[[], AscentSteps]], until: float) -> None:
        """Make and warm up as many as there is time for, in their order; the first one in any case."""
        for key, make in makers.items():
            if self.runners and time.monotonic() > until:
                self.failed[key] = "not measured: the time was up"
                continue
            try:
                made: list[AscentSteps] = []
                self.warmed[key] = seconds(lambda make=make, made=made: self._warm(make, made), device=self.device)
                self.runners[key] = made[0]
            except Exception as error:
                self.failed[key] = reason(error)

    def _warm(self, make: Callable[[], AscentSteps], made: list[AscentSteps]) -> None:
        made.append(make())
        made[0](self.warm)

    def rounds(self, most: int, until: float) -> None:
        """Time all in turns, from another one on in each round; one round in any case."""
        for turn in range(most):
            if turn and time.monotonic() > until:
                return
            keys = list(self.runners)
            first = turn % max(len(keys), 1)
            for key in keys[first:] + keys[:first]:
                try:
                    step = seconds(lambda key=key: self.runners[key](self.chunk), device=self.device) / self.chunk
                except Exception as error:
                    self.failed[key] = reason(error)
                    del self.runners[key]
                    self.times.pop(key, None)
                else:
                    self.times.setdefault(key, []).append(step)
