"""What SAM costs beside its two passes: climb and restore, as a whole step minus the base's own.

    python benchmarks/step/run.py                                          Steppe and the floor
    python benchmarks/step/run.py --classic sam.py --peers DIR             and two others
    python benchmarks/step/run.py --threads 2 --name step-2-threads        wall time of two threads
    python benchmarks/step/run.py --case decoder_1b                        12 to 17 GB

``--classic`` is the file of github.com/davda54/sam (its versions differ much in what they move; the result names the
one that was measured), ``--peers`` a folder of
``pip install --no-deps --target DIR pytorch_optimizer==4.1.0``.

The base is SGD; the gradients are put by hand, twice a step. In every round each method is built, warmed up, timed
and dropped, in turns; so no two of them hold memory at a time. A method's time is its step's minus the base's in the
same round, which has the same two puttings and one ``zero_grad``. With one thread on a CPU it is processor time, else
wall time; on a GPU after waiting for it. Steppe's look for NaN and inf in the gradient that goes down (1N more) is part
of its time; the others have none.

Operations and traffic are counted at the dispatcher (counting.py), the base's taken off: what an operation reads and
writes, in units of the weights' size N. The scheme's own traffic is 8N: norm 1N, backup 2N, climb 3N, restore 2N, which
the floor does over one flat buffer in four operations (7N if copy and climb were one pass). More memory is the peak of
what a step has made and kept, counted likewise; on a GPU, the result also has the allocator's own figure. The host's
time is that of as many tensors of hardly an entry.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import results  # noqa: E402
from step.counting import Counted, kernels  # noqa: E402
from step.implementations import Build, Floor, Put, Step, found, tensors  # noqa: E402
from step.shapes import CASES, TITLES, Shapes, toy, weights  # noqa: E402
from step.table import render  # noqa: E402
from timing import spread  # noqa: E402

FLOOR_AT_MOST = 1 << 28  # entries; beyond, its time is in proportion


def main() -> None:
    """Measure, write the result, print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be repeated; all but the largest")
    parser.add_argument("--classic", type=Path, metavar="FILE", help="the classic implementation, sam.py")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a folder with pytorch_optimizer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, help="steps in one timing; by default, by the number of weights")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--name", default="step", help="of the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    methods, versions = found(arguments.classic, arguments.peers)
    names = arguments.case or (list(CASES) if arguments.device == "cuda" else ["resnet18", "vit_b16"])
    data = {
        "cases": [_case(name, methods, arguments) for name in names],
        "host": [row for name in CASES for row in _host(name, methods, arguments)],
    }
    path = results.save(arguments.name, data, arguments, **versions)
    print(render(results.read(path)))
    print(path)


def _case(name: str, methods: dict[str, Build], arguments: argparse.Namespace) -> dict[str, Any]:
    """Time, and what is counted, of all methods with one network's tensors."""
    shapes = toy(name) if arguments.tiny else CASES[name]()
    size, dtype = weights(shapes), getattr(torch, arguments.dtype)
    parameters, put = _putting(shapes, arguments.device, dtype)
    part = min(size, FLOOR_AT_MOST)

    def floor(_: object) -> Step:
        return Floor(part, arguments.device, dtype).step

    def copy(_: object) -> Step:
        return Floor(part, arguments.device, dtype).copy

    turns = {**methods, "floor": floor, "copy": copy}
    rounds = 2 if arguments.tiny else arguments.rounds
    repeat = arguments.repeat or (1 if arguments.tiny else max(3, min(20, 100_000_000 // size)))
    clock = _clock(arguments)
    times: dict[str, list[float]] = {key: [] for key in turns}
    for turn in range(rounds):
        order = list(turns)
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            step = turns[key](parameters)
            times[key].append(_seconds(step, put, repeat, clock))
            del step
            _forget(parameters)
    beside_base = _beside_base(times)
    beside_base["floor"] = [t * size / part for t in times["floor"]]
    base = _counts(methods["base"], parameters, put, arguments.device)
    rows = []
    for key, own in beside_base.items():
        counts = _counts(turns[key], parameters, put, arguments.device)
        if key == "floor":
            counts = {k: v if k in ("operations", "kernels") else v * size / part for k, v in counts.items()}
        else:
            counts = {k: v - base[k] for k, v in counts.items()}
        in_bytes = counts.pop("moved") / size
        for memory in ("peak", "allocator"):
            if memory in counts:
                counts[memory] /= size * dtype.itemsize
        rows.append(
            {
                "method": key,
                "time": spread(own, beside_base["steppe"]),
                "bytes": in_bytes,
                "traffic": in_bytes / dtype.itemsize,
                "memory": counts.pop("peak") if key != "floor" else 1.0,
                **counts,
            }
        )
    return {
        "case": name,
        "title": TITLES[name],
        "tensors": len(shapes),
        "weights": size,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "repeat": repeat,
        "rounds": rounds,
        "copy_gb_s": 2 * part * dtype.itemsize / statistics.median(times["copy"]) / 1e9,
        "rows": rows,
    }


def _host(name: str, methods: dict[str, Build], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The time in which the host is done, with as many tensors as the network has and hardly a weight in them."""
    parameters, put = _putting(toy(name), arguments.device, torch.float32)
    steps = {key: build(parameters) for key, build in methods.items()}
    repeat, rounds = (1, 2) if arguments.tiny else (50, max(arguments.rounds, 7))
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            times[key].append(_seconds(step, put, repeat, time.process_time if arguments.device == "cpu" else None))
    own = _beside_base(times)
    return [
        {"method": key, "tensors": len(parameters), "time": spread(values, own["steppe"])}
        for key, values in own.items()
    ]


def _putting(shapes: Shapes, device: str, dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], Put]:
    """Weights, and what stands for a backward."""
    parameters, gradients = tensors(shapes, device, dtype)

    def put() -> None:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g

    return parameters, put


def _forget(parameters: list[torch.nn.Parameter]) -> None:
    """Leave nothing of a method behind but the weights."""
    for p in parameters:
        p.grad = None
    gc.collect()


def _clock(arguments: argparse.Namespace) -> Callable[[], float] | None:
    """Processor time where it is the time of all the work; None for a GPU's, after waiting for it."""
    if arguments.device == "cuda":
        return _when_done
    return time.process_time if arguments.threads == 1 else time.perf_counter


def _when_done() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(step: Step, put: Put, repeat: int, clock: Callable[[], float] | None) -> float:
    """Seconds a step. Without a clock: until the host has asked for them, however long the device takes."""
    step(put)
    step(put)
    if clock is None:
        _when_done()
        clock = time.perf_counter
    begin = clock()
    for _ in range(repeat):
        step(put)
    return (clock() - begin) / repeat


def _beside_base(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The methods' own time, round by round."""
    others = [key for key in times if key not in ("base", "floor", "copy")]
    return {key: [t - b for t, b in zip(times[key], times["base"], strict=True)] for key in others}


def _counts(build: Build, parameters: list[torch.nn.Parameter], put: Put, device: str) -> dict[str, float]:
    """Operations, bytes moved and peak memory of a step after the first; on a GPU also what it ran."""
    put()
    known = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    step = build(parameters)
    with Counted(known) as counted:
        step(put)
        counted.operations = counted.read = counted.written = 0
        step(put)
    seen: dict[str, float] = {
        "operations": counted.operations,
        "moved": counted.read + counted.written,
        "peak": counted.peak,
    }
    if device == "cuda":
        _when_done()
        torch.cuda.reset_peak_memory_stats()
        step(put)
        _when_done()
        seen["allocator"] = torch.cuda.max_memory_allocated() - before
        seen["kernels"], seen["kernel_seconds"] = kernels(partial(step, put))
    del step
    _forget(parameters)
    return seen


if __name__ == "__main__":
    main()
