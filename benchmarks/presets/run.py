"""Which cheap climb, or which of them together, is better than plain SAM at equal compute?

    python benchmarks/presets/run.py search --data DIR      many presets and radii, two seeds each
    python benchmarks/presets/run.py confirm SPEC ...       these, with SGD and SAM, on images that no search has seen

The search trains on 3,000 images of Fashion-MNIST's training set that the packaged sample does not have, and scores by
10,000 others of it: so neither the sample nor any test image has a say in what is chosen. The confirmation is the demo
with other seeds: the packaged sample and its test images. Each contender gets 20 standardized epochs. A run is a
line of a file, and is not made twice; ``--jobs 2`` makes two at a time, of one thread each.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from presets.contender import register  # noqa: E402
from steppe.experiments import data  # noqa: E402
from steppe.experiments.data import Dataset, Split  # noqa: E402
from steppe.experiments.distributed import join, resolve  # noqa: E402
from steppe.experiments.recipes import RECIPES, Recipe, Unit  # noqa: E402
from steppe.experiments.training import train  # noqa: E402

TRAIN, SCORE = range(10_000, 13_000), range(40_000, 50_000)
RADII = (0.05, 0.1, 0.2)


def candidates() -> Iterator[str]:
    """Every contender of the search; SGD and SAM first."""
    yield "sgd"
    for rho in RADII:
        yield f"sam:rho={rho}"
    for rho in RADII:
        for k in (2, 5):
            yield f"preset:rho={rho},k={k},reuse=0.7"
    for rho in (0.1, 0.2):
        yield f"preset:rho={rho},start=0.5"
        yield f"preset:rho={rho},fraction=0.25"
        yield f"preset:rho={rho},k=5,reuse=0.7,fraction=0.25"
        yield f"preset:rho={rho},k=2,reuse=0.7,fraction=0.25"
        yield f"preset:rho={rho},start=0.5,fraction=0.25"
        yield f"preset:rho={rho},k=2"
    yield "preset:rho=0.4,fraction=0.25"
    yield "preset:rho=0.1,k=10,reuse=0.7"
    yield "preset:rho=0.1,k=5,reuse=0.4"
    yield "preset:rho=0.1,k=5,reuse=1.0"
    yield "preset:rho=0.1,k=2,reuse=0.4"
    yield "preset:rho=0.1,k=5,reuse=0.7,start=0.5"
    yield "preset:rho=0.1,k=2,reuse=0.7,start=0.5"
    yield "preset:rho=0.1,norms=true"
    yield "preset:rho=0.3,norms=true"
    yield "preset:rho=0.1,k=5,reuse=0.7,norms=true"
    yield "preset:rho=0.1,start=0.5,norms=true"
    yield "preset:rho=1.0,k=5,reuse=0.7,adaptive=true"
    yield "gsam:rho=0.1"
    yield "vasso:rho=0.1"
    yield "micro_sam:rho=0.05,m=16"
    yield "micro_sam:rho=0.1,m=16"


def searched(folder: Path | None) -> Dataset:
    """Training images that the packaged sample does not have, and others to score by."""
    full = data.load("fashion-mnist", folder).train
    parts = (Split(full.images[list(part)], full.labels[list(part)]) for part in (TRAIN, SCORE))
    return Dataset("search", *parts, "Fashion-MNIST's training images 10,000 to 13,000, scored by 40,000 to 50,000")


def recipe(args: argparse.Namespace, seeds: Sequence[int], methods: Sequence[str]) -> Recipe:
    """The demo's setting."""
    demo = RECIPES["demo"][0]
    options: dict[str, Any] = {"methods": tuple(methods), "seeds": len(seeds), "first_seed": seeds[0]}
    return replace(demo, **options, epochs=args.epochs, eval_every=args.epochs, threads=1, device="cpu", amp=args.amp)


def one(job: tuple[Unit, Dataset]) -> dict[str, Any]:
    """Train a run; return what it came to."""
    unit, dataset = job
    register()
    with join(unit.recipe) as world, tempfile.TemporaryDirectory() as folder:
        last = train(unit, Path(folder), dataset, world)[-1]
    return {"method": unit.method, "seed": unit.seed, **last.to_json()}


def main() -> None:
    """Parse the arguments and make the runs that are not made yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "confirm"])
    parser.add_argument("specs", nargs="*", help="contenders; the search has a list of its own")
    parser.add_argument("--data", type=Path, help="the folder of the full Fashion-MNIST")
    parser.add_argument("--seeds", type=int, help="runs of each; 2 in the search, 8 in the confirmation")
    parser.add_argument("--epochs", type=int, default=20, help="standardized epochs")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="the file of the runs, JSON lines")
    args = parser.parse_args()
    register()
    torch.set_num_threads(1)
    seeds = range(100, 100 + (args.seeds or 8)) if args.what == "confirm" else range(args.seeds or 2)
    dataset = data.load("sample") if args.what == "confirm" else searched(args.data)
    at = resolve(recipe(args, seeds, args.specs or list(candidates())))
    made = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(run["method"], run["seed"]) for run in made}
    jobs = [(unit, dataset) for unit in at.units() if (unit.method, unit.seed) not in known]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool, args.out.open("a") as file:
        for number, run in enumerate(pool.imap_unordered(one, jobs), 1):
            file.write(json.dumps(run) + "\n")
            file.flush()
            print(
                f"{number}/{len(jobs)} {run['method']} seed {run['seed']}: {run['test_accuracy']:.2f} {run['gap']:.2f}"
            )


if __name__ == "__main__":
    main()
