"""Measure what makes training fast on a CPU: threads, memory layout, precision, torch.compile, and parallel runs.

    python benchmarks/cpu/run.py                 all of it: a quarter of an hour on two cores
    python benchmarks/cpu/run.py --no-compile    without torch.compile, whose compilations take most of that time

A step is the demo's: forward, backward and SGD's step of a PreAct ResNet-18 of width 16 with a stem of stride 2, on a
batch of 64 images; a SAM step makes forward and backward twice. Two other widths show whether the same configuration is
the fastest there. Compiled networks are measured at the demo's width; their first step, which compiles, is reported
separately.

An evaluation is a forward without gradients, in evaluation mode, over 1,000 images in chunks.

Parallel runs are processes that train the same network at the same time. One process with a thread on each core is
compared with as many processes as cores, of one thread each, by the steps per second of all processes together.

All rows of a table are timed in turns in one run; ratios are medians over the rounds, relative to float32 in the
contiguous layout with all cores. channels_last on several threads is left out at widths that are no multiple of 16,
where torch 2.13 writes out of bounds; Steppe raises an error there.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cpu.configurations import Sizes, measure_evaluations, measure_steps
from cpu.parallel_runs import measure_parallel_runs
from cpu.table import render
from results import add_arguments, read, save
from steppe.experiments.execution.cpus import available

DEMO = Sizes()
TINY = Sizes(batch=8, width=2, widths=(3,), images=20, chunks=(10, 20), rounds=2, repeat=1)


def main() -> None:
    """Measure, save the result and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, device="cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    arguments = parser.parse_args()
    sizes, cores = (TINY if arguments.tiny else DEMO), available()
    data = {
        "cores": cores,
        "batch": sizes.batch,
        "width": sizes.width,
        "images": sizes.images,
        "steps": measure_steps(sizes, cores, compiled=arguments.compile),
        "evaluations": measure_evaluations(sizes, cores),
        "parallel_runs": measure_parallel_runs(sizes, cores),
    }
    print(render(read(save("cpu", data, arguments))))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
