"""Methods timed in turns, so that a machine whose speed drifts is the same for all; what to quote are the ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Times = dict[str, list[float]]


def in_turns(
    methods: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: str = "cpu",
    repeat: int = 1,
    warmup: int = 1,
) -> Times:
    """Seconds of one call of each, round by round, in an order that turns from round to round.

    Args:
        methods: functions without arguments.
        rounds: how often each is timed.
        device: "cuda" waits for the device before each look at the clock.
        repeat: calls in one timing.
        warmup: calls before the first round.
    """
    for function in methods.values():
        for _ in range(warmup):
            function()
    times: Times = {name: [] for name in methods}
    names = list(methods)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(methods[name], device=device, repeat=repeat))
    return times


def seconds(function: Callable[[], object], *, device: str = "cpu", repeat: int = 1) -> float:
    """Seconds of one call, as the mean of ``repeat``."""
    _wait(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        function()
    _wait(device)
    return (time.perf_counter() - begin) / repeat


def spread(times: Sequence[float], beside: Sequence[float]) -> dict[str, float]:
    """Median and range of the times, and of how many times those of another method they are, round by round.

    >>> spread([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])["ratio"]
    2.0
    """
    ratios = [t / o for t, o in zip(times, beside, strict=True)]
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
