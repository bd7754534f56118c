"""Measure what SAM costs besides its two passes: perturb and restore, as a whole step minus the base's own step.

    python benchmarks/step/run.py                                          Steppe and the lower bound
    python benchmarks/step/run.py --classic sam.py --peers DIR             and the other implementations
    python benchmarks/step/run.py --threads 2 --name step-2-threads        wall time of two threads
    python benchmarks/step/run.py --case decoder_1b                        12 to 17 GB

``--classic`` is the file sam.py of github.com/davda54/sam; its versions differ much in their traffic, so the result has
the version that was measured. ``--peers`` is a folder made by

    pip install --no-deps --target DIR pytorch_optimizer==4.1.0 temperon==0.1.1 sam-pytorch==0.0.1 heavyball==3.2.1 \\
        unifiedsam==1.0.0 zij==0.1.1 opt-einsum

Each is used as in its own documentation. Composer's SAM exists in its Trainer only, and optax's in JAX only, so neither
has a step that could be timed here. HeavyBall wraps its own SGD, whose time is subtracted; it is not compiled, because
that takes minutes for each list of tensors on a CPU.

The base is SGD; the gradients are assigned by hand, twice per step. In every round each implementation is built, warmed
up, timed and deleted, in turns, so no two of them hold memory at a time. The time of an implementation is that of its
step minus that of a step of the base in the same round, with the same two assignments and one ``zero_grad``. Times are
processor time with one thread of a CPU, otherwise wall time; on a GPU after synchronization. The time of Steppe
includes its check for NaN and inf in the update gradient (1N more); the other implementations have no such check. It
does not include the steps that Steppe measures for ``report()``, one of 128, each of which takes about as long as two.

Operations and traffic are counted at the dispatcher (counting.py), without those of the base. Traffic is the bytes that
operations read and write, in units of the weights' size N. That of the method itself is 8N: norm 1N, backup 2N, perturb
3N, restore 2N. The lower bound does the same over one flat buffer in four operations (7N if backup and perturbation
were one operation). Additional memory is the peak of the memory that a step allocates, counted in the same way; on a
GPU, the result also has the peak that torch's allocator reports. The time of the host is measured with as many tensors
of at most two entries per dimension, in steps directly one after the other, and on a CPU also with cold caches.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import results  # noqa: E402
from step.implementations import implementations  # noqa: E402
from step.measuring import Setup, measure_case, measure_host  # noqa: E402
from step.parameter_shapes import CASES  # noqa: E402
from step.table import render  # noqa: E402


def main() -> None:
    """Measure, save the result and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be repeated; all but the largest")
    parser.add_argument("--classic", type=Path, metavar="FILE", help="the classic implementation, sam.py")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a folder with the other implementations")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, help="steps per timing; by default, by the number of weights")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--name", default="step", help="the name of the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    builders, versions = implementations(args.classic, args.peers)
    gc.freeze()  # imports leave many objects, which every collection between two timings would visit
    setup = Setup(args.device, args.dtype, args.threads, args.rounds, args.repeat, args.tiny)
    names = args.case or (list(CASES) if args.device == "cuda" else ["resnet18", "vit_b16"])
    data = {
        "cases": [measure_case(name, builders, setup) for name in names],
        "host": [row for name in CASES for row in measure_host(name, builders, setup)],
    }
    path = results.save(args.name, data, args, **versions)
    print(render(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
