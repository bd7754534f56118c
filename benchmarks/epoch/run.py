"""Images per second of whole training steps: the base, SAM and cheaper methods; cost against batch size and width.

    python benchmarks/epoch/run.py                       on a GPU if there is one, else in one thread of a CPU
    python benchmarks/epoch/run.py --amp --compile       computed in bfloat16, with a compiled network
    python benchmarks/epoch/run.py --graphs              on a GPU: each step one CUDA graph; saved as epoch_graphs

A step is all that training computes on a batch: forward, backward, perturbing, the second pass, restoring and the
base's own step, with the experiments' PreAct ResNet-18, on random images that are on the device already. On a CPU,
network and batch are the demo's (width 16, 64 images, a stem of stride 2), in float32; on a GPU the article's (width
64, 128 images), with bfloat16 autocast. Images and convolutions are channels-last, except with several threads of a
CPU, where torch 2.13's backward of a strided 1x1 convolution writes out of bounds in that layout.

Each method is timed directly before and after its base, in one run: quote the ratios, which are medians over the
timings. The base is SGD; for MSAM, which perturbs along the momentum, the base is SGD with momentum. Methods whose
steps differ are timed over whole periods, so that the mean is that of a whole training. The ratio minus the planned
passes is the overhead of the perturbation itself, of small batches and of Python.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epoch.methods import MSAM, PLAIN_SAM, QUARTER, Problem, methods
from epoch.table import render
from epoch.timed_methods import time_methods
from results import add_arguments, read, save
from timing import error_line

Sizes = tuple[int, ...]

# The problem, and the batch sizes and widths that it is measured with.
CPU: tuple[Problem, Sizes, Sizes] = (Problem(64, 16, 2), (8, 16, 32, 64, 128, 256), (4, 8, 16, 32, 64))
GPU = (Problem(128, 64, 1, "cuda", amp=True), (8, 16, 32, 64, 128, 256, 512, 1024), (8, 16, 32, 64, 128))
TINY = (Problem(8, 2, 2), (4, 8), (2, 4))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all methods, and then the three with a target at other sizes."""
    problem, batches, widths = sizes(arguments)
    seconds, least = (0.0, 1) if arguments.tiny else (60.0 * arguments.minutes, 3)
    rows, failed = time_methods(methods(problem), problem, seconds=0.5 * seconds, least=least)
    around = [replace(problem, batch=batch) for batch in batches] + [replace(problem, width=width) for width in widths]
    distinct = list(dict.fromkeys(around))
    points = [point(p, seconds=0.35 * seconds / len(distinct), least=min(least, 2)) for p in distinct]
    settings = asdict(problem) | {"threads": torch.get_num_threads()}
    return {"problem": settings, "methods": rows, "failed": failed, "points": points}


def sizes(arguments: argparse.Namespace) -> tuple[Problem, Sizes, Sizes]:
    """Return the problem, the batch sizes and the widths."""
    on_gpu = arguments.device == "cuda"
    problem, batches, widths = TINY if arguments.tiny else GPU if on_gpu else CPU
    amp = problem.amp if arguments.amp is None else arguments.amp
    channels_last = on_gpu or arguments.threads == 1
    options = {"compile": arguments.compile, "graphs": arguments.graphs}
    return replace(problem, device=arguments.device, amp=amp, channels_last=channels_last, **options), batches, widths


def point(problem: Problem, *, seconds: float, least: int) -> dict[str, Any]:
    """Time SAM, SAM with a quarter of the batch, and MSAM at one size."""
    found: dict[str, Any] = {"batch": problem.batch, "width": problem.width}
    try:
        rows, failed = time_methods([PLAIN_SAM, QUARTER, MSAM], problem, seconds=seconds, least=least)
    except Exception as error:  # such as a problem too large for this device: the others must not be lost
        return found | {"methods": {}, "failed": {"SGD": error_line(error)}}
    return found | {"methods": rows, "failed": failed}


def main() -> None:
    """Measure, save the result and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast; by default on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile the network")
    parser.add_argument("--graphs", action="store_true", help="capture each step as a CUDA graph")
    parser.add_argument("--threads", type=int, default=1, help="threads of a CPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="the approximate time limit")
    arguments = parser.parse_args()
    if arguments.graphs and arguments.device != "cuda":
        parser.error("--graphs: a CPU has no CUDA graphs; leave it out, or use --device cuda on a machine with a GPU")
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    else:
        torch.backends.cudnn.benchmark = True
    path = save("epoch_graphs" if arguments.graphs else "epoch", measure(arguments), arguments)
    print(render(read(path)))


if __name__ == "__main__":
    main()
