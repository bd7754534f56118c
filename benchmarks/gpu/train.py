"""One piece of the list: runs of the recipe `article`, stopped by SIGTERM and gone on with at the next call.

    python benchmarks/gpu/run.py --only article-0

The state has a folder of the piece: begun.json (how its runs are trained: decided once, so that all calls train
alike), and of each run its metrics, its checkpoint while it is in progress, what is known of its flatness, and then
outcome.json. The weights are dropped as soon as their flatness is measured: they are all that is large here.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]

import results  # noqa: E402
from gpu.flatness import flatness  # noqa: E402
from gpu.place import Place, add_arguments  # noqa: E402
from gpu.plan import Training, pieces  # noqa: E402
from presets.method import register  # noqa: E402
from steppe.experiments import data  # noqa: E402
from steppe.experiments.config.recipe import RECIPES, Recipe, Run  # noqa: E402
from steppe.experiments.data.datasets import Dataset, Split  # noqa: E402
from steppe.experiments.errors import ExperimentError  # noqa: E402
from steppe.experiments.execution.progress import Lines  # noqa: E402
from steppe.experiments.storage.files import write_json  # noqa: E402
from steppe.experiments.storage.records import Record, read_records  # noqa: E402
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS  # noqa: E402
from steppe.experiments.training.run import train  # noqa: E402
from steppe.experiments.training.stopping import Stop, Stopped, on_signals  # noqa: E402
from steppe.experiments.world import World, join, resolve  # noqa: E402

GOES_ON = 75  # the exit status of one that was stopped: "a temporary failure; try again" since sysexits.h
PLAIN = "plain"
"""A file in the piece's folder: train without CUDA graphs, which may not work everywhere."""

_TINY_IMAGES = 320
_SECONDS_A_PASS = 2.0  # where the article's experiment has not been measured


@dataclass
class Watch(Lines):
    """Tells each measurement, and ends the training exactly where a run's flatness is due."""

    due: frozenset[int] = frozenset()
    cut: bool = False
    """Be asked to stop after the first measurement, as a rehearsal of it."""

    def measured(self, run: Run, record: Record) -> None:
        """Say it; stop where the weights are wanted, with a checkpoint of exactly these."""
        super().measured(run, record)
        if self.cut:
            os.kill(os.getpid(), signal.SIGTERM)
        if record.standardized_epoch in self.due:
            raise Stopped(signal.SIGTERM)


class Runs:
    """The runs of a piece, in its folder of the state."""

    def __init__(self, name: str, training: Training, place: Place) -> None:
        self.name, self.training, self.place = name, training, place
        self.folder = place.state / name
        self.begun = self._begin()

    def recipes(self) -> Iterator[tuple[str, Recipe]]:
        """Each way of training, with its recipe for this device."""
        article = RECIPES["article"][0]
        if self.place.arguments.tiny:
            article = replace(article, dataset="sample", width=2, stem_stride=4, batch_size=64, threads=1)
        else:
            article = replace(article, data_dir=self.place.arguments.data)
        recipe = replace(
            article,
            methods=tuple(self.training.methods),
            first_seed=self.training.seeds[0],
            seeds=len(self.training.seeds),
            epochs=self.begun["epochs"],
            extra_epochs=self.training.extra_epochs,
            eval_every=self.training.eval_every,
            device=self.place.arguments.device,
        )
        for way, fields in self.training.ways.items():
            yield way, resolve(replace(recipe, **{**self.begun["configuration"], **fields}))

    def runs(self) -> Iterator[tuple[str, Run, Path]]:
        """Each run, with the way that it is trained in and its folder."""
        for way, recipe in self.recipes():
            for run in recipe.runs():
                yield way, run, self.folder / "runs" / f"{way}-{run.name}".removeprefix("-")

    def dataset(self) -> Dataset:
        """The images, on the CPU."""
        if not self.place.arguments.tiny:
            return data.load("fashion-mnist", self.place.arguments.data)
        full = data.load("sample")
        train, test = (Split(s.images[:_TINY_IMAGES], s.labels[:_TINY_IMAGES]) for s in (full.train, full.test))
        return replace(full, train=train, test=test)

    def train(self, *, cut: bool = False) -> None:
        """Train what is not finished. Raises Stopped when it was asked to stop."""
        images = self.dataset().to(self.place.arguments.device)
        began = time.monotonic()
        try:
            with on_signals() as stop:
                for way, run, folder in self.runs():
                    if not (folder / "outcome.json").exists():
                        self._one(way, run, folder, images, stop, cut)
        finally:
            self.begun["wall"] += time.monotonic() - began
            self.begun["calls"] += 1
            self._write()

    def result(self) -> dict[str, Any]:
        """What came out."""
        recipes = {way: replace(recipe, data_dir=None).to_json() for way, recipe in self.recipes()}
        outcomes = [json.loads((folder / "outcome.json").read_text()) for *_, folder in self.runs()]
        return {**self.begun, "recipes": recipes, "runs": outcomes}

    def _one(self, way: str, run: Run, folder: Path, images: Dataset, stop: Stop, cut: bool) -> None:
        with join(run.recipe) as world:
            try:
                found = {"records": [r.to_json() for r in self._trained(run, folder, images, world, stop, cut)]}
            except ExperimentError as error:
                found = {"failed": str(error)}
        measured = folder / "flatness.json"
        if measured.exists():
            found["flatness"] = json.loads(measured.read_text())
        write_json(folder / "outcome.json", {"way": way, "method": run.method, "seed": run.seed, **found})
        (folder / CHECKPOINT).unlink(missing_ok=True)

    def _trained(self, run: Run, folder: Path, images: Dataset, world: World, stop: Stop, cut: bool) -> list[Record]:
        """Train a run, with a rest wherever its flatness is measured; return its records."""
        file = folder / "flatness.json"
        ends = {run.recipe.epochs, run.standardized_epochs} if self.training.flatness else set()
        while True:
            known = json.loads(file.read_text()) if file.exists() else {}
            due = frozenset(end for end in ends if str(end) not in known)
            here = _point(folder)
            if here in due and (folder / CHECKPOINT).exists():  # there may have been no room for it on the way here
                print(f"flatness after {here} standardized epochs", flush=True)
                found = flatness(run, folder, images, stop, tiny=self.place.arguments.tiny)
                write_json(file, {**known, str(here): found})
                continue
            try:
                return train(run, folder, images, world, Watch(due=due, cut=cut), stop)
            except Stopped:
                if stop:
                    raise

    def _begin(self) -> dict[str, Any]:
        """How the runs are trained: as it was decided at the first call."""
        plain = (self.folder / PLAIN).exists()
        file = self.folder / "begun.json"
        if file.exists():
            begun = dict(json.loads(file.read_text()))
            if not plain or begun["configuration"].get("cuda_graphs") is False:
                return begun
            shutil.rmtree(self.folder / "runs", ignore_errors=True)  # they belong to the configuration that failed
        configuration = self._configuration() | ({"cuda_graphs": False} if plain else {})
        epochs, why = self._epochs()
        begun = {"configuration": configuration, "epochs": epochs, "fewer": why, "wall": 0.0, "calls": 0}
        write_json(file, begun)
        return begun

    def _configuration(self) -> dict[str, bool]:
        """What made the loop fastest, but for the compiler: it would work for minutes at every call."""
        fastest = (self.place.result("loop") or {}).get("fastest") or {"channels_last": True}
        known = ("amp", "channels_last") if fastest.get("compile") else ("amp", "channels_last", "cuda_graphs")
        return {name: fastest[name] for name in known if name in fastest}

    def _write(self) -> None:
        write_json(self.folder / "begun.json", self.begun)

    def _epochs(self) -> tuple[int, str | None]:
        """How many standardized epochs, and why not all of them."""
        training = self.training
        like = self.place.result(training.like) if training.like else None
        if like is not None:
            return like["epochs"], like["fewer"]
        if training.minutes is None:
            return training.epochs, None
        passes = len(training.methods) * len(training.seeds) * len(training.ways)
        seconds, whence = self._seconds_a_pass()
        most = int(training.minutes * 60 / (passes * seconds)) // training.eval_every * training.eval_every
        epochs = max(min(training.epochs, most), training.eval_every)
        told = f"{epochs} of {training.epochs} standardized epochs, for {training.minutes:g} minutes"
        return epochs, f"{told} at {seconds:.2g} s a pass ({whence})" if epochs < training.epochs else None

    def _seconds_a_pass(self) -> tuple[float, str]:
        runs = (self.place.result("article-0") or {"runs": []})["runs"]
        ends = [run["records"][-1] for run in runs if "records" in run]
        if not ends:
            return _SECONDS_A_PASS, "a guess: the article's experiment has no result"
        spent = sum(end["seconds"] for end in ends)
        return max(spent, 1e-3) / sum(end["standardized_epoch"] for end in ends), "as in the article's experiment"


def tiny(training: Training) -> Training:
    """The same at a size that says nothing."""
    return replace(training, epochs=2, extra_epochs=min(training.extra_epochs, 1), eval_every=1, minutes=None)


def verdict(found: dict[str, Any]) -> str:
    """A line of what came out."""
    said = []
    for run in found["runs"]:
        name = f"{run['way']} {run['method']} seed {run['seed']}".strip()
        if "failed" in run:
            said.append(f"{name} failed: {run['failed']}")
        else:
            end = run["records"][-1]
            said.append(f"{name}: test {end['test_accuracy']:.2f} %, gap {end['gap']:.2f}, {end['seconds']:.0f} s")
    return "; ".join(said)


def _point(folder: Path) -> int:
    """The standardized epoch of the last measurement; 0 before the first one."""
    path = folder / METRICS
    records = read_records(path.read_text()) if path.exists() else []
    return records[-1].standardized_epoch if records else 0


def main() -> int:
    """Parse the arguments, go on, and answer with the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {piece.name: piece.training for piece in pieces() if piece.training}
    parser.add_argument("name", choices=known)
    parser.add_argument("--cut", action="store_true", help="stop after the first measurement, as if asked to")
    add_arguments(parser)
    args = parser.parse_args()
    register()
    training = tiny(known[args.name]) if args.tiny else known[args.name]
    runs = Runs(args.name, training, Place(args))
    try:
        runs.train(cut=args.cut)
    except Stopped:
        print("stopped, and goes on at the next call")
        return GOES_ON
    found = runs.result()
    sys.argv = [str(HERE / "run.py"), "--only", args.name]  # what somebody would type
    results.save(args.name, found, args)
    shutil.rmtree(runs.folder)
    print(f"= {verdict(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
