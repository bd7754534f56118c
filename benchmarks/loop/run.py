"""The article's experiment, choice by choice: what makes a pass over its 60,000 images fast, and how fast can it be?

    python benchmarks/loop/run.py --data DIR                 Fashion-MNIST's files; without, random images like them
    python benchmarks/loop/run.py --classic FILE             with the sam.py of github.com/davda54/sam
    python benchmarks/loop/run.py --device cpu --tiny        does it run?

SGD and SAM in two styles of loop. The article's: float32, eager, a DataLoader whose data set normalizes image by image,
pinned and copied to the device batch by batch, the loss read at each step, SAM by a loop over the parameters. Ours:
`steppe.experiments.training.run`, the data on the device, with each choice alone and with all together. Float32 means what
torch makes of it by default, which for convolutions on a GPU is TF32, in both styles.

All are warmed up, and then timed in turns: some steps each, again and again. Seconds are those of one pass of 60,000
images, extrapolated from the steps; a step of SAM counts as two passes. A DataLoader with workers goes on loading
while others are timed, which is to its advantage. The best of what a recipe can ask for then makes two whole passes.
Evaluation and checkpoint are timed too, and the minutes of the whole experiment added up from all that. On a CPU the
network is the demo's, without what needs a GPU: it shows that the benchmark works.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loop.article import Article, classic
from loop.choices import Choice, Ours, choices
from loop.floor import floor
from loop.race import AscentSteps, Key, Race, reason
from loop.table import render
from results import add_arguments, load, save
from steppe.experiments.config.recipe import RECIPES, Recipe
from steppe.experiments.data import datasets as data
from steppe.experiments.data.batches import count
from steppe.experiments.data.datasets import Dataset, Split
from steppe.experiments.storage import checkpoints
from timing import seconds, spread

ARTICLE = "article's style"
METHODS = {"sgd": 1, "sam": 2}  # passes a step


@dataclass(frozen=True)
class RunContext:
    """What is trained, and how much of it is timed."""

    recipe: Recipe
    dataset: Dataset
    """On the CPU."""
    warm: int
    chunk: int
    rounds: int
    workers: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return count(len(self.dataset.train), self.recipe.batch_size)


def setting(args: argparse.Namespace) -> RunContext:
    """The article's, or a tiny one."""
    recipe = replace(RECIPES["article"][0], seeds=1, device=args.device, threads=1)
    if args.tiny:
        recipe = replace(recipe, width=2, stem_stride=2, batch_size=16)
        return RunContext(recipe, random_images(88, 32), warm=8, chunk=2, rounds=2, workers=(0,))
    dataset = data.load("fashion-mnist", args.data) if args.data is not None else random_images(60_000, 10_000)
    if args.device == "cpu":
        recipe = replace(recipe, width=16, stem_stride=2)
        return RunContext(recipe, dataset, warm=4, chunk=4, rounds=3, workers=(0, 1))
    return RunContext(recipe, dataset, warm=75, chunk=60, rounds=5, workers=(4, 0))


def random_images(train: int, test: int) -> Dataset:
    """Noise in the shape of Fashion-MNIST."""
    g = torch.Generator().manual_seed(0)
    splits = (
        Split(
            torch.randint(0, 256, (n, 1, 28, 28), generator=g, dtype=torch.uint8),
            torch.randint(0, 10, (n,), generator=g),
        )
        for n in (train, test)
    )
    return Dataset("random", *splits, "random images")


def methods(at: RunContext, on_device: Dataset, args: argparse.Namespace) -> dict[Key, Callable[[], AscentSteps]]:
    """How each is made, what matters most first."""
    sam = classic(args.classic)
    found: dict[Key, Callable[[], AscentSteps]] = {}
    for workers in at.workers:
        for method in METHODS:
            make = partial(Article, at.recipe, method, at.dataset.train, workers, sam)
            found[_article(workers), method] = make
    for name, choice in choices(args.device, tiny=args.tiny).items():
        for method in METHODS:
            found[name, method] = partial(Ours, at.recipe, method, on_device, choice)
    return found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Time everything, as far as there is time."""
    begin, span = time.monotonic(), 60.0 * args.minutes
    at = setting(args)
    on_device = at.dataset.to(args.device)
    network = training_network(at, args.device)
    found: dict[str, Any] = {
        "setting": {
            "images": len(at.dataset.train),
            "data": at.dataset.source,
            "batch_size": at.recipe.batch_size,
            "width": at.recipe.width,
            "steps_per_pass": at.steps,
            "warm_up_steps": at.warm,
            "steps_in_a_timing": at.chunk,
            "classic": args.classic.name if args.classic is not None else "a loop over the parameters",
        },
        "floor": floor(network, *_batch(at, on_device), args.device, tiny=args.tiny),
    }
    del network
    race = Race(args.device, at.warm, at.chunk)
    race.enter(methods(at, on_device, args), begin + 0.6 * span)
    race.rounds(at.rounds, begin + 0.75 * span)
    found |= summary(race, at, choices(args.device, tiny=args.tiny), args.device)
    save("loop", found, args)
    best = {method: race.runners.get((found["fastest_choice"], method)) for method in METHODS}
    try:
        found |= whole(best, at, args.device)
    except Exception as error:
        found["whole_passes_failed"] = reason(error)
    return found


def training_network(at: RunContext, device: str) -> torch.nn.Module:
    """The network, to count by."""
    return Ours(replace(at.recipe, device="cpu"), "sgd", at.dataset, Choice()).run.network.to(device)


def _batch(at: RunContext, on_device: Dataset) -> tuple[torch.Tensor, int]:
    images = data.normalize(on_device.train.images[: at.recipe.batch_size])
    return images, len(at.dataset.train)


def summary(race: Race, at: RunContext, known: dict[str, Choice], device: str) -> dict[str, Any]:
    """A row a method, in seconds a pass; and which choice of a recipe is fastest, both methods together."""
    rows: list[dict[str, Any]] = []
    passes = {key: [step * at.steps / METHODS[key[1]] for step in steps] for key, steps in race.times.items()}
    beside = {method: _theirs(passes, method) for method in METHODS}
    for (name, method), times in passes.items():
        n = min(len(times), len(beside[method] or times))
        numbers = spread(times[:n], (beside[method] or times)[:n])
        rows.append({"choice": name, "method": method, "warm_up": race.warmed[name, method], **numbers})
    rows += [{"choice": name, "method": method, "failed": why} for (name, method), why in race.failed.items()]
    both = {
        name: sum(sorted(passes[name, m])[len(passes[name, m]) // 2] for m in METHODS)
        for name, choice in known.items()
        if (choice.on_offer or device == "cpu") and all((name, m) in passes for m in METHODS)
    }
    fastest = min(both, key=both.__getitem__, default=None)
    chosen = None if fastest is None else known[fastest].fields
    return {"rows": rows, "fastest_choice": fastest, "fastest": chosen}


def _theirs(passes: dict[Key, list[float]], method: str) -> list[float] | None:
    """The article's style, with as many workers as is fastest."""
    theirs = [times for (name, m), times in passes.items() if name.startswith(ARTICLE) and m == method]
    return min(theirs, key=min, default=None)


def whole(best: dict[str, Any], at: RunContext, device: str) -> dict[str, Any]:
    """Two whole passes of the best, an evaluation and a checkpoint of it; and the experiment in minutes."""
    run = best["sam"].run
    epochs = {method: 2 // METHODS[method] for method in METHODS}
    made = {
        method: [
            seconds(partial(best[method], at.steps), device=device) / METHODS[method] for _ in range(epochs[method])
        ]
        for method in METHODS
    }
    kept = run.spent
    run.spent = at.recipe.eval_every * run.images  # so that a measurement is due
    run.measure(lambda: None)  # it may have to be compiled
    look = seconds(lambda: run.measure(lambda: None), device=device)
    run.spent = kept
    with tempfile.TemporaryDirectory() as folder:
        save_it = partial(checkpoints.save, Path(folder) / "checkpoint.pt", "benchmark")
        saving = seconds(lambda: save_it(run.state_dict()), device=device)
    runs = {run.method: run for run in replace(at.recipe, methods=tuple(METHODS)).runs()}
    minutes = {
        "training": sum(min(made[m]) * run.standardized_epochs for m, run in runs.items()) / 60,
        "evaluation": sum(len(run.grid) for run in runs.values()) * look / 60,
        "checkpoints": sum(run.standardized_epochs / METHODS[m] for m, run in runs.items()) * saving / 60,
    }
    return {
        "whole_passes": made,
        "evaluation": look,
        "checkpoint": saving,
        "experiment_passes": {m: run.standardized_epochs for m, run in runs.items()},
        "experiment_minutes": {**minutes, "together": sum(minutes.values())},
    }


def _article(workers: int) -> str:
    return f"{ARTICLE}, {workers or 'no'} workers"


def main() -> None:
    """Parse the arguments, measure, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--data", type=Path, help="the folder of Fashion-MNIST's files")
    parser.add_argument("--classic", type=Path, help="the sam.py of github.com/davda54/sam")
    parser.add_argument("--minutes", type=float, default=9.0, help="about how long it may take")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # many compiled variants live in this process; a further one must not silently run eagerly
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    save("loop", measured(args), args)
    for result in load("loop", args.results):
        print(render(result))


if __name__ == "__main__":
    main()
