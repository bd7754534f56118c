"""Time functions in turns, so that changes in the speed of the machine affect all alike; quote the ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Times = dict[str, list[float]]
T = TypeVar("T")


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: str = "cpu",
    repeat: int = 1,
    warmup: int = 1,
) -> Times:
    """Time one call of each function in every round, in an order that rotates from round to round.

    Args:
        functions: functions without arguments, by name.
        rounds: number of timings of each.
        device: "cuda" synchronizes the device before every reading of the clock.
        repeat: calls per timing.
        warmup: calls before the first round.

    Returns:
        The seconds of a call, by name.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: Times = {name: [] for name in functions}
    for turn in range(rounds):
        for name in rotated(list(functions), turn):
            times[name].append(seconds(functions[name], device=device, repeat=repeat))
    return times


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """Return the items in the order of a round, beginning with another one in each round.

    >>> rotated("abc", 1)
    ['b', 'c', 'a']
    """
    first = turn % max(len(items), 1)
    return [*items[first:], *items[:first]]


def seconds(function: Callable[[], object], *, device: str = "cpu", repeat: int = 1) -> float:
    """Return the seconds of one call, the mean of ``repeat``."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        function()
    _synchronize(device)
    return (time.perf_counter() - begin) / repeat


def spread(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return median and range of the times, and of their ratios to those of another function, round by round.

    >>> spread([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])["ratio"]
    2.0
    """
    ratios = [t / r for t, r in zip(times, reference, strict=True)]
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
    }


def error_line(error: BaseException) -> str:
    """Return an error in one line of at most 200 characters: its type and the first line of its message.

    >>> error_line(ValueError("not a number: 3, 4\\nmore"))
    'ValueError: not a number: 3, 4'
    """
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {message}"[:200]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
