"""Search for a cheaper perturbation, or a combination of several, that is better than plain SAM at equal compute.

    python benchmarks/presets/run.py search                 many presets and radii, one seed each
    python benchmarks/presets/run.py search --seeds 4 SPEC ...      the best presets again, with more seeds
    python benchmarks/presets/run.py confirm SPEC ...       selected methods, on images not used in the search
    python benchmarks/presets/run.py larger SPEC ...        selected methods, with four times the images

All stages train at equal compute, with the demo's network and settings. The search trains on 3,000 images of
Fashion-MNIST's training set and evaluates on 10,000 others of it, so neither the packaged sample nor any test image
influences what is selected. The confirmation is the demo, with other seeds. Each run is saved when it is finished, and
is not repeated.
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

import results  # noqa: E402
from presets.method import register  # noqa: E402
from presets.table import render  # noqa: E402
from steppe.experiments.config.presets import RECIPES  # noqa: E402
from steppe.experiments.config.recipe import Recipe, Run  # noqa: E402
from steppe.experiments.config.resolve import resolve  # noqa: E402
from steppe.experiments.data import datasets  # noqa: E402
from steppe.experiments.data.datasets import Dataset, Split  # noqa: E402
from steppe.experiments.tasks.images import images_task  # noqa: E402
from steppe.experiments.training.run import train  # noqa: E402
from steppe.experiments.world import join  # noqa: E402

SEARCH, EVALUATION, LARGER = slice(10_000, 13_000), slice(40_000, 50_000), slice(13_000, 25_000)
SAVED = ("passes", "steps", "train_accuracy", "test_accuracy", "gap", "train_loss", "test_loss", "seconds")
RADII = (0.05, 0.1, 0.2)


def candidates() -> Iterator[str]:
    """Yield all methods of the search, SGD and SAM first."""
    yield "sgd"
    for rho in RADII:
        yield f"sam:rho={rho}"
    for rho in RADII:
        for interval in (2, 5):
            yield f"preset:rho={rho},interval={interval},reuse=0.7"
    for rho in (0.1, 0.2):
        yield f"preset:rho={rho},start=0.5"
        yield f"preset:rho={rho},fraction=0.25"
        yield f"preset:rho={rho},interval=5,reuse=0.7,fraction=0.25"
        yield f"preset:rho={rho},interval=2,reuse=0.7,fraction=0.25"
        yield f"preset:rho={rho},start=0.5,fraction=0.25"
        yield f"preset:rho={rho},interval=2"
    yield "preset:rho=0.4,fraction=0.25"
    yield "preset:rho=0.1,interval=10,reuse=0.7"
    yield "preset:rho=0.1,interval=5,reuse=0.4"
    yield "preset:rho=0.1,interval=5,reuse=1.0"
    yield "preset:rho=0.1,interval=2,reuse=0.4"
    yield "preset:rho=0.1,interval=5,reuse=0.7,start=0.5"
    yield "preset:rho=0.1,interval=2,reuse=0.7,start=0.5"
    yield "preset:rho=0.1,norms=true"
    yield "preset:rho=0.3,norms=true"
    yield "preset:rho=0.1,interval=5,reuse=0.7,norms=true"
    yield "preset:rho=0.1,start=0.5,norms=true"
    yield "preset:rho=1.0,interval=5,reuse=0.7,adaptive=true"
    yield "gsam:rho=0.1"
    yield "vasso:rho=0.1"
    yield "micro_batch_sam:rho=0.05,m=16"
    yield "micro_batch_sam:rho=0.1,m=16"


@dataclass(frozen=True)
class Stage:
    """The images that a stage trains and evaluates on, its seeds and its length."""

    description: str
    seeds: range
    epochs: int
    dataset: Callable[[Path | None], Dataset]


def part_of_full(train: slice, evaluation: slice | None, folder: Path | None) -> Dataset:
    """Return a part of Fashion-MNIST's training images, with another part, or the test images, for evaluation."""
    full = datasets.load("fashion-mnist", folder)
    parts = [
        Split(split.images[part], split.labels[part])
        for split, part in ((full.train, train), (full.train, evaluation))
        if part
    ]
    return Dataset("fashion-mnist", *parts, *([] if evaluation else [full.test]), full.source)


STAGES = {
    "search": Stage(
        "3,000 of Fashion-MNIST's training images, evaluated on 10,000 others of them",
        *(range(1), 20, partial(part_of_full, SEARCH, EVALUATION)),
    ),
    "confirm": Stage(
        "the packaged sample: 3,000 training images, evaluated on 3,000 test images",
        *(range(100, 108), 20, lambda folder: datasets.load("sample")),
    ),
    "larger": Stage(
        "12,000 training images of Fashion-MNIST, evaluated on its 10,000 test images",
        *(range(200, 204), 30, partial(part_of_full, LARGER, None)),
    ),
}


def recipe(stage: Stage, methods: Sequence[str], *, amp: bool, tiny: bool) -> Recipe:
    """Return the demo's setting, evaluated at the end only."""
    epochs, seeds, width = (1, range(1), 2) if tiny else (stage.epochs, stage.seeds, 16)
    made = {"methods": tuple(methods), "seeds": len(seeds), "first_seed": seeds[0], "epochs": epochs}
    return RECIPES["demo"][0].replace(**made, eval_every=epochs, width=width, threads=1, device="cpu", amp=amp)


def train_run(job: tuple[Run, Dataset]) -> dict[str, Any]:
    """Train a run; return its final values."""
    run, dataset = job
    register()
    with (
        join(run.recipe.hardware.device, run.recipe.hardware.threads) as world,
        tempfile.TemporaryDirectory() as folder,
    ):
        last = train(run, Path(folder), images_task(dataset, run.recipe), world)[-1]
    return {"method": str(run.method), "seed": run.seed, **{name: last[name] for name in SAVED}}


def main() -> None:
    """Train the runs of a stage that are missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("specs", nargs="*", help="methods; the search has its own list")
    parser.add_argument("--data", type=Path, help="the folder of the full Fashion-MNIST")
    parser.add_argument("--seeds", type=int, help="runs of each method; by default the number of the stage")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, of one thread each")
    results.add_arguments(parser, device="cpu")
    args = parser.parse_intermixed_args()
    register()
    stage, name = STAGES[args.stage], f"presets_{args.stage}" + "_bfloat16" * args.amp
    specs = args.specs or list(candidates())
    if args.seeds is not None:
        stage = replace(stage, seeds=range(stage.seeds.start, stage.seeds.start + args.seeds))
    resolved = resolve(recipe(stage, specs[:2] if args.tiny else specs, amp=args.amp, tiny=args.tiny))
    found: dict[str, Any] = {
        "description": stage.description,
        "epochs": resolved.comparison.epochs,
        "runs": results.saved_data(name, args).get("runs", []),
    }
    known = {(run["method"], run["seed"]) for run in found["runs"]}
    runs = [run for run in resolved.runs() if (str(run.method), run.seed) not in known]
    if runs:
        dataset = stage.dataset(args.data)
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for run in pool.imap_unordered(train_run, [(run, dataset) for run in runs]):
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
