"""What makes training fast on a CPU: threads, memory layout, precision, torch.compile, and several runs at a time.

    python benchmarks/cpu/run.py                 all of it: a quarter of an hour on two cores
    python benchmarks/cpu/run.py --no-compile    without torch.compile, whose warm-ups take most of that

A step is the demo's: forward, backward and SGD's step of a PreAct ResNet-18 of width 16 with a stem of stride 2, on a
batch of 64 images; a SAM step is two of them. Two other widths say whether the same choice is the fastest there.
Compiled networks are measured at the demo's width; their first step, which compiles, is told apart.

An evaluation is a pass without gradients, in evaluation mode, over 1,000 images in chunks.

Runs at a time are processes that train the same at the same moment: one with all cores as its threads, against as many
as there are cores, with one thread each. What counts is how many steps all of them make in a second.

All of a table are timed in turns in one run; the ratios are medians over the rounds, against float32 in the contiguous
layout with all cores. channels_last on several threads is left out at widths that are no multiple of 16: torch 2.13
writes beyond its memory there, and Steppe refuses it.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cpu.choices import Sizes, evaluations, steps
from cpu.processes import at_once
from cpu.table import render
from results import add_arguments, read, save
from steppe.experiments.execution.cpus import available

DEMO = Sizes()
TINY = Sizes(batch=8, width=2, widths=(3,), images=20, chunks=(10, 20), rounds=2, repeat=1)


def main() -> None:
    """Measure, write the result, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, device="cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    arguments = parser.parse_args()
    sizes, cores = (TINY if arguments.tiny else DEMO), available()
    data = {
        "cores": cores,
        "batch": sizes.batch,
        "width": sizes.width,
        "images": sizes.images,
        "steps": steps(sizes, cores, compiled=arguments.compile),
        "evaluations": evaluations(sizes, cores),
        "at_once": at_once(sizes, cores),
    }
    print(render(read(save("cpu", data, arguments))))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
