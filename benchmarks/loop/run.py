"""Time a pass over the 60,000 images of the article's experiment with several training loops, and a lower bound.

    python benchmarks/loop/run.py --data DIR                 Fashion-MNIST's files; by default, random images
    python benchmarks/loop/run.py --classic FILE             with the sam.py of github.com/davda54/sam
    python benchmarks/loop/run.py --device cpu --tiny        as a test

SGD and SAM are trained by two kinds of loop. The loop in the article's style computes in float32 without compilation.
Its DataLoader normalizes image by image; every batch is pinned and copied to the device, every loss is read on the
host, and SAM is a Python loop over the parameters. Steppe's loop is `steppe.experiments.training.run`, with the data on
the device, in each configuration alone and in combinations. Float32 has torch's default meaning in both loops: TF32 for
convolutions on a GPU.

All loops are warmed up and then timed in turns, some steps at a time. Seconds are those of one pass over 60,000 images,
extrapolated from the steps; a step of SAM counts as two passes. A DataLoader with workers continues to load while other
loops are timed, so its times are too small. Then two whole passes of the fastest configuration that a recipe can select
are timed, with evaluation and checkpoints, to compute the minutes of the whole experiment. On a CPU the network is the
demo's, and configurations that need a GPU are left out; this only tests the benchmark.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loop.article_loop import ArticleLoop, sam_class
from loop.candidates import Candidates, Key, TrainingLoop, failure
from loop.configurations import Configuration, SteppeLoop, configurations
from loop.lower_bound import lower_bound
from loop.table import render
from results import add_arguments, load, save
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data import datasets
from steppe.experiments.data.batches import count
from steppe.experiments.data.datasets import Dataset, Split
from steppe.experiments.storage import checkpoint_file
from timing import seconds, spread

ARTICLE = "article's style"
METHODS = {"sgd": 1, "sam": 2}  # passes per step


@dataclass(frozen=True)
class Workload:
    """The recipe that is trained, and how much of it is timed."""

    recipe: Recipe
    dataset: Dataset
    """On the CPU."""
    warmup_steps: int
    chunk: int
    rounds: int
    workers: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return count(len(self.dataset.train), self.recipe.training.batch_size)


def main() -> None:
    """Measure, save the result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--data", type=Path, help="the folder of Fashion-MNIST's files")
    parser.add_argument("--classic", type=Path, help="the sam.py of github.com/davda54/sam")
    parser.add_argument("--minutes", type=float, default=9.0, help="the approximate time limit")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # many compiled variants share this process; beyond torch's default limit a further one would silently run eagerly
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    save("loop", measure(args), args)
    for result in load("loop", args.results):
        print(render(result))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time as many loops as the time limit allows, and then two whole passes of the fastest."""
    begin, span = time.monotonic(), 60.0 * args.minutes
    work = workload(args)
    on_device = work.dataset.to(args.device)
    network = training_network(work, args.device)
    images = datasets.normalize(on_device.train.images[: work.recipe.training.batch_size])
    found: dict[str, Any] = {
        "workload": {
            "images": len(work.dataset.train),
            "data": work.dataset.source,
            "batch_size": work.recipe.training.batch_size,
            "width": work.recipe.model.width,
            "steps_per_pass": work.steps,
            "warmup_steps": work.warmup_steps,
            "steps_per_timing": work.chunk,
            "classic": args.classic.name if args.classic is not None else "a loop over the parameters",
        },
        "lower_bound": lower_bound(network, images, len(work.dataset.train), args.device, tiny=args.tiny),
    }
    del network
    candidates = Candidates(args.device, work.warmup_steps, work.chunk)
    candidates.build(builders(work, on_device, args), begin + 0.6 * span)
    candidates.time(work.rounds, begin + 0.75 * span)
    found |= summary(candidates, work, configurations(args.device, tiny=args.tiny), args.device)
    save("loop", found, args)
    fastest = {method: candidates.loops.get((found["fastest_configuration"], method)) for method in METHODS}
    try:
        found |= whole_passes(fastest, work, args.device)
    except Exception as error:
        found["whole_passes_failed"] = failure(error)
    return found


def workload(args: argparse.Namespace) -> Workload:
    """Return the article's experiment, the demo's network on a CPU, or a tiny one."""
    recipe = RECIPES["article"][0].replace(seeds=1, device=args.device, threads=1)
    if args.tiny:
        recipe = recipe.replace(width=2, stem_stride=2, batch_size=16)
        return Workload(recipe, random_images(88, 32), warmup_steps=8, chunk=2, rounds=2, workers=(0,))
    dataset = datasets.load("fashion-mnist", args.data) if args.data is not None else random_images(60_000, 10_000)
    if args.device == "cpu":
        recipe = recipe.replace(width=16, stem_stride=2)
        return Workload(recipe, dataset, warmup_steps=4, chunk=4, rounds=3, workers=(0, 1))
    return Workload(recipe, dataset, warmup_steps=75, chunk=60, rounds=5, workers=(4, 0))


def random_images(train: int, test: int) -> Dataset:
    """Return noise in the shape of Fashion-MNIST."""
    g = torch.Generator().manual_seed(0)
    splits = (
        Split(
            torch.randint(0, 256, (n, 1, 28, 28), generator=g, dtype=torch.uint8),
            torch.randint(0, 10, (n,), generator=g),
        )
        for n in (train, test)
    )
    return Dataset("random", *splits, "random images")


def training_network(work: Workload, device: str) -> torch.nn.Module:
    """Return the network of the workload, to count its operations."""
    loop = SteppeLoop(work.recipe.replace(device="cpu"), "sgd", work.dataset, Configuration())
    return loop.run.network.to(device)


def builders(work: Workload, on_device: Dataset, args: argparse.Namespace) -> dict[Key, Callable[[], TrainingLoop]]:
    """Return functions that build the loops, the most important first."""
    sam = sam_class(args.classic)
    found: dict[Key, Callable[[], TrainingLoop]] = {}
    for workers in work.workers:
        for method in METHODS:
            name = f"{ARTICLE}, {workers or 'no'} workers"
            found[name, method] = partial(ArticleLoop, work.recipe, method, work.dataset.train, workers, sam)
    for name, configuration in configurations(args.device, tiny=args.tiny).items():
        for method in METHODS:
            found[name, method] = partial(SteppeLoop, work.recipe, method, on_device, configuration)
    return found


def summary(candidates: Candidates, work: Workload, known: Mapping[str, Configuration], device: str) -> dict[str, Any]:
    """Return one row per loop, in seconds per pass, and the fastest configuration, both methods together."""
    rows: list[dict[str, Any]] = []
    passes = {key: [step * work.steps / METHODS[key[1]] for step in steps] for key, steps in candidates.times.items()}
    references = {method: _article_times(passes, method) for method in METHODS}
    for (name, method), times in passes.items():
        reference = references[method] or times
        n = min(len(times), len(reference))
        numbers = spread(times[:n], reference[:n])
        warmup = candidates.warmup_seconds[name, method]
        rows.append({"configuration": name, "method": method, "warmup": warmup, **numbers})
    for (name, method), reason in candidates.failed.items():
        rows.append({"configuration": name, "method": method, "failed": reason})
    both = {
        name: sum(sorted(passes[name, m])[len(passes[name, m]) // 2] for m in METHODS)
        for name, configuration in known.items()
        if (configuration.in_recipe or device == "cpu") and all((name, m) in passes for m in METHODS)
    }
    fastest = min(both, key=both.__getitem__, default=None)
    fields = None if fastest is None else known[fastest].fields
    return {"rows": rows, "fastest_configuration": fastest, "fastest": fields}


def _article_times(passes: Mapping[Key, list[float]], method: str) -> list[float] | None:
    """Return the times of the article's style, with the number of workers that is fastest."""
    found = [times for (name, m), times in passes.items() if name.startswith(ARTICLE) and m == method]
    return min(found, key=min, default=None)


def whole_passes(fastest: Mapping[str, Any], work: Workload, device: str) -> dict[str, Any]:
    """Time two whole passes of the fastest loops, an evaluation and a checkpoint; add up the whole experiment."""
    training = fastest["sam"].run
    passes = {
        method: [
            seconds(partial(fastest[method], work.steps), device=device) / METHODS[method]
            for _ in range(2 // METHODS[method])
        ]
        for method in METHODS
    }
    spent = training.spent
    training.spent = work.recipe.evaluation.eval_every * training.samples_per_epoch  # so that an evaluation is due
    training.measure(lambda: None)  # the first one may compile
    evaluation = seconds(lambda: training.measure(lambda: None), device=device)
    training.spent = spent
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint = partial(checkpoint_file.save, Path(folder) / "checkpoint.pt", "benchmark")
        checkpoint = seconds(lambda: save_checkpoint(training.state_dict()), device=device)
    runs = {str(run.method): run for run in work.recipe.replace(methods=tuple(METHODS)).runs()}
    minutes = {
        "training": sum(min(passes[m]) * run.standardized_epochs for m, run in runs.items()) / 60,
        "evaluation": sum(len(run.grid) for run in runs.values()) * evaluation / 60,
        "checkpoints": sum(run.standardized_epochs / METHODS[m] for m, run in runs.items()) * checkpoint / 60,
    }
    return {
        "whole_passes": passes,
        "evaluation": evaluation,
        "checkpoint": checkpoint,
        "experiment_passes": {m: run.standardized_epochs for m, run in runs.items()},
        "experiment_minutes": {**minutes, "total": sum(minutes.values())},
    }


if __name__ == "__main__":
    main()
