"""Training loops that are built one by one and then timed in turns; one that fails does not stop the others."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from timing import error_line, rotated, seconds

TrainingLoop = Callable[[int], object]
"""Takes as many steps as it is called with."""

Key = tuple[str, str]
"""The name of a configuration, and the method."""


@dataclass
class Candidates:
    """The loops that can be timed, their times, and the reasons why others could not be timed."""

    device: str
    warmup_steps: int
    """Steps before the first timing: enough for a CUDA graph of each size of batch."""
    chunk: int
    """Steps per timing."""
    loops: dict[Key, TrainingLoop] = field(default_factory=dict)
    warmup_seconds: dict[Key, float] = field(default_factory=dict)
    """Seconds of construction and warm-up."""
    times: dict[Key, list[float]] = field(default_factory=dict)
    """Seconds per step of each timing."""
    failed: dict[Key, str] = field(default_factory=dict)

    def build(self, builders: Mapping[Key, Callable[[], TrainingLoop]], until: float) -> None:
        """Build and warm up the loops in order until the time `until`; the first one in any case."""
        for key, builder in builders.items():
            if self.loops and time.monotonic() > until:
                self.failed[key] = "not measured: the time was up"
                continue
            try:
                built: list[TrainingLoop] = []
                self.warmup_seconds[key] = seconds(
                    lambda builder=builder, built=built: self._warm_up(builder, built), device=self.device
                )
                self.loops[key] = built[0]
            except Exception as error:
                self.failed[key] = failure(error)

    def _warm_up(self, builder: Callable[[], TrainingLoop], built: list[TrainingLoop]) -> None:
        built.append(builder())
        built[0](self.warmup_steps)

    def time(self, rounds: int, until: float) -> None:
        """Time all loops in turns, at most `rounds` times, until the time `until`; one round in any case."""
        for turn in range(rounds):
            if turn and time.monotonic() > until:
                return
            for key in rotated(list(self.loops), turn):
                try:
                    step = seconds(lambda key=key: self.loops[key](self.chunk), device=self.device) / self.chunk
                except Exception as error:
                    self.failed[key] = failure(error)
                    del self.loops[key]
                    self.times.pop(key, None)
                else:
                    self.times.setdefault(key, []).append(step)


def failure(error: Exception) -> str:
    """Return the cell of the table for a loop that failed."""
    return f"failed: {error_line(error)}"
