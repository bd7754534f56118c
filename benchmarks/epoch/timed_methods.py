"""Time methods in turns, each directly before and after its base."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from epoch.methods import MOMENTUM, SGD, Method, Problem
from memory import Step
from timing import error_line, in_turns, rotated, spread

GPU_STEPS = 10
"""Steps per timing on a GPU, without a synchronization between them, as in training."""

WARMUP_STEPS = 3
"""Steps before the first timing, in which memory is allocated, kernels are chosen and code is compiled."""


@dataclass(frozen=True)
class TimedMethod:
    """A method ready to be timed."""

    method: Method
    call: Callable[[], None]
    steps: int
    """Steps per call."""


@dataclass
class Times:
    """Seconds of a step, and of a step of the base directly before or after it."""

    own: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)

    def row(self, method: Method, batch: int) -> dict[str, Any]:
        """Return the values for the result."""
        ratios = [own / base for own, base in zip(self.own, self.base, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found = {**spread(self.own, self.base), "ratio_low": low, "ratio_high": high}
        return {
            "passes": round(method.passes, 4),
            "images_per_second": round(batch / found["seconds"], 1),
            **{name: float(f"{value:.5g}") for name, value in found.items()},
            "timings": len(ratios),
            "momentum": method.momentum,
            **({} if method.target is None else {"target": method.target}),
        }


def time_methods(
    methods: Sequence[Method], problem: Problem, *, seconds: float, least: int, most: int = 100
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time methods for some seconds; return the row of each, and the reasons why others could not be timed.

    In every round each method takes its steps twice, once after those of its base and once before them, so that both
    are slowed down alike. A timing of a cadence spans a whole period.

    Args:
        methods: methods around SGD, with or without momentum.
        problem: the network and the images.
        seconds: no round begins later, except for the least number of rounds.
        least: the smallest number of rounds.
        most: the largest number of rounds.
    """
    gc.collect()  # free the networks of an earlier call
    timed, failed = _build(methods, problem)
    bases = {0.0: _timed_method(SGD, problem), MOMENTUM.momentum: _timed_method(MOMENTUM, problem)}
    times = [Times() for _ in timed]
    end = time.monotonic() + seconds
    for turn in range(most):
        if turn >= least and time.monotonic() > end:
            break
        for each, own_times in rotated(list(zip(timed, times, strict=True)), turn):
            _time(each, bases[each.method.momentum], own_times, problem.device)
    rows = {t.method.name: own.row(t.method, problem.batch) for t, own in zip(timed, times, strict=True)}
    return rows, failed


def _time(timed: TimedMethod, base: TimedMethod, times: Times, device: str) -> None:
    found = in_turns({"base": base.call, "own": timed.call}, 2, device=device, warmup=0)
    times.own += [seconds / timed.steps for seconds in found["own"]]
    times.base += [seconds / base.steps for seconds in found["base"]]


def _build(methods: Sequence[Method], problem: Problem) -> tuple[list[TimedMethod], dict[str, str]]:
    """Return the methods ready to be timed, and the reasons for those that cannot be."""
    timed, failed = [], {}
    for method in methods:
        if problem.graphs and not method.capturable:
            failed[method.name] = "not one CUDA graph: its steps differ"
            continue
        try:
            timed.append(_timed_method(method, problem))
        except Exception as error:  # one method that fails must not stop the others
            failed[method.name] = error_line(error)
    return timed, failed


def _timed_method(method: Method, problem: Problem) -> TimedMethod:
    step = method.build_step(problem)
    if problem.graphs:
        step = captured(step)
    least = GPU_STEPS if problem.device == "cuda" else 1
    steps = method.period * math.ceil(least / method.period)

    def call() -> None:
        for _ in range(steps):
            step()

    for _ in range(math.ceil(WARMUP_STEPS / steps)):
        call()
    return TimedMethod(method, call, steps)


@dataclass(frozen=True)
class Captured:
    """A step captured as a CUDA graph, and the step itself, which keeps the graph's tensors alive."""

    graph: torch.cuda.CUDAGraph
    step: Step

    def __call__(self) -> None:
        """Take the step."""
        self.graph.replay()


def captured(step: Step) -> Captured:
    """Warm up on another stream, as a capture requires, and capture a step without taking it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return Captured(graph, step)
