"""Time and count the steps of implementations with the tensors of one network."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from step.counting import Counted, kernels
from step.implementations import BASES, AssignGradients, Builder, LowerBound, Step, tensors
from step.parameter_shapes import CASES, TITLES, Shapes, toy, weights
from timing import rotated, spread

_MAX_ENTRIES = 1 << 28  # of the lower bound's buffer; beyond, its time is extrapolated

_LARGER_THAN_CACHES = 1 << 23  # entries of float32: 32 MiB, read and written

# For its report, Steppe measures steps 0, 8 and 64, and later one of 128: of few timed steps, step 8 must not be one.
_WARM_UP = 9

Clock = Callable[[], float]


@dataclass(frozen=True)
class Setup:
    """Device, precision and number of the timings."""

    device: str
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 7
    repeat: int | None = None
    """Steps per timing; None chooses it by the number of weights."""
    tiny: bool = False

    @property
    def clock(self) -> Clock:
        """Processor time on one thread, wall time otherwise; a GPU is synchronized before every reading."""
        if self.device == "cuda":
            return _synchronized_time
        return time.process_time if self.threads == 1 else time.perf_counter


def measure_case(name: str, builders: Mapping[str, Builder], setup: Setup) -> dict[str, Any]:
    """Return times and counts of all implementations with one network's tensors."""
    shapes = toy(name) if setup.tiny else CASES[name]()
    size, dtype = weights(shapes), getattr(torch, setup.dtype)
    parameters, assign = _parameters(shapes, setup.device, dtype)
    entries = min(size, _MAX_ENTRIES)

    def lower_bound(_: object) -> Step:
        return LowerBound(entries, setup.device, dtype).step

    def copy(_: object) -> Step:
        return LowerBound(entries, setup.device, dtype).copy

    timed = {**builders, "lower_bound": lower_bound, "copy": copy}
    rounds = 2 if setup.tiny else setup.rounds
    repeat = setup.repeat or (1 if setup.tiny else max(3, min(20, 100_000_000 // size)))
    times: dict[str, list[float]] = {key: [] for key in timed}
    for turn in range(rounds):
        for key in rotated(list(timed), turn):
            step = timed[key](parameters)
            times[key].append(_seconds(step, assign, repeat, setup.clock))
            del step
            _free(parameters)
    own_times = _minus_base(times)
    own_times["lower_bound"] = [t * size / entries for t in times["lower_bound"]]
    bases = {key: _counts(builders[key], parameters, assign, setup.device) for key in _bases(builders)}
    rows = []
    for key, own in own_times.items():
        counts = _counts(timed[key], parameters, assign, setup.device)
        if key == "lower_bound":
            counts = {k: v if k in ("operations", "kernels") else v * size / entries for k, v in counts.items()}
        else:
            counts = {k: v - bases[_base(key)][k] for k, v in counts.items()}
        rows.append(
            {
                "implementation": key,
                "time": spread(own, own_times["steppe"]),
                **_in_units_of_weights(counts, size, dtype.itemsize),
                **({"memory": 1.0} if key == "lower_bound" else {}),
            }
        )
    return {
        "case": name,
        "title": TITLES[name],
        "tensors": len(shapes),
        "weights": size,
        "dtype": setup.dtype,
        "threads": setup.threads,
        "repeat": repeat,
        "rounds": rounds,
        "copy_gb_s": 2 * entries * dtype.itemsize / statistics.median(times["copy"]) / 1e9,
        "rows": rows,
    }


def measure_host(name: str, builders: Mapping[str, Builder], setup: Setup) -> list[dict[str, Any]]:
    """Return the times of the host, with as many tensors as a network has, of at most two entries per dimension.

    They are measured twice: steps directly one after the other, and on a CPU also steps whose caches were filled with
    other data before, as by the two passes of a training step.
    """
    parameters, assign = _parameters(toy(name), setup.device, torch.float32)
    steps = {key: build(parameters) for key, build in builders.items()}
    repeat, rounds = (1, 2) if setup.tiny else (20, 2 * max(setup.rounds, 7))
    clock = time.process_time if setup.device == "cpu" else None
    times: dict[str, list[float]] = {key: [] for key in steps}
    cold: dict[str, list[float]] = {key: [] for key in steps}
    other = torch.zeros(1 if setup.tiny else _LARGER_THAN_CACHES)
    for turn in range(rounds):
        for key in rotated(list(steps), turn):
            times[key].append(_seconds(steps[key], assign, repeat, clock))
            if clock is not None:
                cold[key].append(_seconds_cold(steps[key], assign, other, max(repeat // 4, 1), clock))
    own_times = _minus_base(times)
    own_cold = _minus_base(cold) if clock is not None else {}
    return [
        {
            "implementation": key,
            "tensors": len(parameters),
            "time": spread(values, own_times["steppe"]),
            **({"cold": spread(own_cold[key], own_cold["steppe"])} if own_cold else {}),
        }
        for key, values in own_times.items()
    ]


def _seconds_cold(step: Step, assign: AssignGradients, other: torch.Tensor, repeat: int, clock: Clock) -> float:
    """Return the seconds of a step after each of which the caches are filled with other data."""
    total = 0.0
    for _ in range(repeat):
        other.add_(1)
        begin = clock()
        step(assign)
        total += clock() - begin
    return total / repeat


def _parameters(shapes: Shapes, device: str, dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], AssignGradients]:
    """Return weights, and a function that assigns their gradients in place of a backward."""
    parameters, gradients = tensors(shapes, device, dtype)

    def assign() -> None:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g

    return parameters, assign


def _free(parameters: list[torch.nn.Parameter]) -> None:
    """Free everything but the weights."""
    for p in parameters:
        p.grad = None
    gc.collect()


def _synchronized_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(step: Step, assign: AssignGradients, repeat: int, clock: Clock | None) -> float:
    """Return the seconds of a step. Without a clock, time the host only, however long the device takes."""
    for _ in range(_WARM_UP):
        step(assign)
    if clock is None:
        _synchronized_time()
        clock = time.perf_counter
    begin = clock()
    for _ in range(repeat):
        step(assign)
    return (clock() - begin) / repeat


def _minus_base(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return the times of the implementations without those of their bases, round by round."""
    others = [key for key in times if key not in (*_bases(times), "lower_bound", "copy")]
    return {key: [t - b for t, b in zip(times[key], times[_base(key)], strict=True)] for key in others}


def _base(implementation: str) -> str:
    return BASES.get(implementation, "base")


def _bases(implementations: Iterable[str]) -> list[str]:
    return [key for key in implementations if key == "base" or key in BASES.values()]


def _counts(
    build: Builder, parameters: list[torch.nn.Parameter], assign: AssignGradients, device: str
) -> dict[str, float]:
    """Return operations, bytes moved and peak memory of a step after the first; on a GPU also its kernels."""
    assign()
    known = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    step = build(parameters)
    with Counted(known) as counted:
        step(assign)
        counted.operations = counted.read = counted.written = 0
        step(assign)
    found: dict[str, float] = {
        "operations": counted.operations,
        "moved": counted.read + counted.written,
        "peak": counted.peak,
    }
    if device == "cuda":
        _synchronized_time()
        torch.cuda.reset_peak_memory_stats()
        step(assign)
        _synchronized_time()
        found["allocator"] = torch.cuda.max_memory_allocated() - before
        found["kernels"], found["kernel_seconds"] = kernels(partial(step, assign))
    del step
    _free(parameters)
    return found


def _in_units_of_weights(counts: Mapping[str, float], size: int, itemsize: int) -> dict[str, float]:
    """Return the counts with bytes per weight, and with traffic and memory in units of the weights' size."""
    bytes_per_weight = counts["moved"] / size
    found = {
        "bytes": bytes_per_weight,
        "traffic": bytes_per_weight / itemsize,
        "memory": counts["peak"] / size / itemsize,
    }
    found |= {k: v for k, v in counts.items() if k not in ("moved", "peak", "allocator")}
    return found | ({"allocator": counts["allocator"] / size / itemsize} if "allocator" in counts else {})
