"""Which cheap climb, or which of them together, is better than plain SAM at equal compute?

    python benchmarks/presets/run.py search                 many presets and radii, a seed each
    python benchmarks/presets/run.py search --seeds 4 SPEC ...      the best of them again
    python benchmarks/presets/run.py confirm SPEC ...       these, on images that no search has seen
    python benchmarks/presets/run.py larger SPEC ...        these, with four times the images

All three at equal compute, with the demo's network and settings. The search trains on 3,000 images of Fashion-MNIST's
training set and scores by 10,000 others of it: so neither the packaged sample nor any test image has a say in what is
chosen. The confirmation is the demo, with other seeds. Each run is kept as it is made, and not made twice.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from presets.method import register  # noqa: E402

import results  # noqa: E402
from presets.table import render  # noqa: E402
from steppe.experiments import data  # noqa: E402
from steppe.experiments.config.recipe import RECIPES, Recipe, Run  # noqa: E402
from steppe.experiments.data.datasets import Dataset, Split  # noqa: E402
from steppe.experiments.training.run import train  # noqa: E402
from steppe.experiments.world import join, resolve  # noqa: E402

SEARCH, SCORE, LARGER = slice(10_000, 13_000), slice(40_000, 50_000), slice(13_000, 25_000)
KEPT = ("passes", "steps", "train_accuracy", "test_accuracy", "gap", "train_loss", "test_loss", "seconds")
RADII = (0.05, 0.1, 0.2)


def candidates() -> Iterator[str]:
    """Every method of the search; SGD and SAM first."""
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
    yield "micro_batch_sam:rho=0.05,m=16"
    yield "micro_batch_sam:rho=0.1,m=16"


@dataclass(frozen=True)
class Stage:
    """What a command trains on, scores by, and how long."""

    about: str
    seeds: range
    epochs: int
    dataset: Callable[[Path | None], Dataset]


def of_full(train: slice, score: slice | None, folder: Path | None) -> Dataset:
    """A part of Fashion-MNIST's training images, with another part of them, or the test images, to score by."""
    full = data.load("fashion-mnist", folder)
    parts = [
        Split(split.images[at], split.labels[at]) for split, at in ((full.train, train), (full.train, score)) if at
    ]
    return Dataset("fashion-mnist", *parts, *([] if score else [full.test]), full.source)


STAGES = {
    "search": Stage(
        "3,000 of Fashion-MNIST's training images, scored by 10,000 others of them",
        *(range(1), 20, partial(of_full, SEARCH, SCORE)),
    ),
    "confirm": Stage(
        "the packaged sample: 3,000 training images, scored by 3,000 test images",
        *(range(100, 108), 20, lambda folder: data.load("sample")),
    ),
    "larger": Stage(
        "12,000 training images of Fashion-MNIST, scored by its 10,000 test images",
        *(range(200, 204), 30, partial(of_full, LARGER, None)),
    ),
}


def recipe(stage: Stage, methods: Sequence[str], *, amp: bool, tiny: bool) -> Recipe:
    """The demo's setting, measured at the end only."""
    epochs, seeds, width = (1, range(1), 2) if tiny else (stage.epochs, stage.seeds, 16)
    made = {"methods": tuple(methods), "seeds": len(seeds), "first_seed": seeds[0], "epochs": epochs}
    return replace(RECIPES["demo"][0], **made, eval_every=epochs, width=width, threads=1, device="cpu", amp=amp)


def one(job: tuple[Run, Dataset]) -> dict[str, Any]:
    """Train a run; return what it came to."""
    run, dataset = job
    register()
    with join(run.recipe) as world, tempfile.TemporaryDirectory() as folder:
        last = train(run, Path(folder), dataset, world)[-1]
    return {"method": run.method, "seed": run.seed, **{name: getattr(last, name) for name in KEPT}}


def main() -> None:
    """Parse the arguments and make the runs that are not made yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("specs", nargs="*", help="methods; the search has a list of its own")
    parser.add_argument("--data", type=Path, help="the folder of the full Fashion-MNIST")
    parser.add_argument("--seeds", type=int, help="runs of each method, in the place of the stage's number")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    results.add_arguments(parser, device="cpu")
    args = parser.parse_intermixed_args()
    register()
    stage, name = STAGES[args.stage], f"presets_{args.stage}" + "_bfloat16" * args.amp
    specs = args.specs or list(candidates())
    if args.seeds is not None:
        stage = replace(stage, seeds=range(stage.seeds.start, stage.seeds.start + args.seeds))
    at = resolve(recipe(stage, specs[:2] if args.tiny else specs, amp=args.amp, tiny=args.tiny))
    found: dict[str, Any] = {
        "about": stage.about,
        "epochs": at.epochs,
        "runs": results.kept(name, args).get("runs", []),
    }
    known = {(run["method"], run["seed"]) for run in found["runs"]}
    runs = [run for run in at.runs() if (run.method, run.seed) not in known]
    if runs:
        dataset = stage.dataset(args.data)
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for run in pool.imap_unordered(one, [(run, dataset) for run in runs]):
                found["runs"].append(run)
                results.save(name, found, args)
                print(
                    f"{run['method']} seed {run['seed']}: {run['test_accuracy']:.2f} %, gap {run['gap']:.2f}",
                    flush=True,
                )
    for result in results.load(name, args.results):
        print(render(result))


if __name__ == "__main__":
    main()
