"""Methods timed in turns, each right beside its base."""

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
from timing import in_turns, spread

ON_GPU = 10  # steps in a timing: a GPU is given them without waiting, as in training
WARM = 3  # steps before the first timing: what remembers has begun to, what is compiled or chosen by speed, is


@dataclass(frozen=True)
class Runner:
    """A method, ready to be timed."""

    method: Method
    call: Callable[[], None]
    steps: int
    """Steps in a call."""


@dataclass
class Times:
    """Seconds of a step, and of one of the base right before or after."""

    own: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)

    def row(self, method: Method, batch: int) -> dict[str, Any]:
        """What the results say."""
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


def race(
    methods: Sequence[Method], problem: Problem, *, seconds: float, least: int, most: int = 100
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time methods for some seconds; return what was found of each, and why some could not be timed.

    In a round each method takes its steps twice, once after those of its base and once before them: what slows the
    machine down then slows both down. Of a cadence, a timing is a whole period.

    Args:
        methods: each around SGD, with or without momentum.
        problem: what is trained.
        seconds: no round begins later, beyond the least number of rounds.
        least: rounds that are made in any case.
        most: rounds that are enough.
    """
    gc.collect()  # the networks of the race before
    runners, failed = _ready(methods, problem)
    bases = {0.0: _runner(SGD, problem), MOMENTUM.momentum: _runner(MOMENTUM, problem)}
    times = [Times() for _ in runners]
    end = time.monotonic() + seconds
    for turn in range(most):
        if turn >= least and time.monotonic() > end:
            break
        for place in range(len(runners)):
            at = (turn + place) % len(runners)
            _time(runners[at], bases[runners[at].method.momentum], times[at], problem.device)
    rows = {r.method.name: t.row(r.method, problem.batch) for r, t in zip(runners, times, strict=True)}
    return rows, failed


def _time(runner: Runner, base: Runner, times: Times, device: str) -> None:
    found = in_turns({"base": base.call, "own": runner.call}, 2, device=device, warmup=0)
    times.own += [seconds / runner.steps for seconds in found["own"]]
    times.base += [seconds / base.steps for seconds in found["base"]]


def _ready(methods: Sequence[Method], problem: Problem) -> tuple[list[Runner], dict[str, str]]:
    """Make them, and the reasons why not: one that fails does not lose the others."""
    runners, failed = [], {}
    for method in methods:
        if problem.graphs and not method.capturable:
            failed[method.name] = "not one CUDA graph: its steps differ"
            continue
        try:
            runners.append(_runner(method, problem))
        except Exception as error:  # (whatever it is, it is told)
            failed[method.name] = reason(error)
    return runners, failed


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _runner(method: Method, problem: Problem) -> Runner:
    step = method.step(problem)
    if problem.graphs:
        step = captured(step)
    least = ON_GPU if problem.device == "cuda" else 1
    steps = method.period * math.ceil(least / method.period)

    def call() -> None:
        for _ in range(steps):
            step()

    for _ in range(math.ceil(WARM / steps)):
        call()
    return Runner(method, call, steps)


@dataclass(frozen=True)
class Captured:
    """A step as a CUDA graph, beside the step itself, which keeps alive what the graph reads and writes."""

    graph: torch.cuda.CUDAGraph
    step: Step

    def __call__(self) -> None:
        """Take the step."""
        self.graph.replay()


def captured(step: Step) -> Captured:
    """Warm up on another stream, as a capture asks for, and capture a step; that one is not taken."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return Captured(graph, step)
