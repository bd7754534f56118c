"""Train the runs of one measurement: those of a recipe, at the article's size.

Stopped by SIGTERM, the training is resumed by the next call.

    python benchmarks/gpu/run.py --only article-0

The folder of the training has plan.json, which the first call writes and all calls follow, and for each run its
metrics, its checkpoint, its flatness and then outcome.json. Weights are deleted as soon as their flatness is measured,
because they are the only large files.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]

from rich.console import Console  # noqa: E402

import results  # noqa: E402
from gpu.device_results import DeviceResults, add_arguments  # noqa: E402
from gpu.flatness import flatness  # noqa: E402
from gpu.measurements import UNFINISHED, WITHOUT_GRAPHS, Training, measurements  # noqa: E402
from presets.method import register  # noqa: E402
from steppe.experiments.config.presets import RECIPES  # noqa: E402
from steppe.experiments.config.recipe import Recipe, Run  # noqa: E402
from steppe.experiments.config.resolve import resolve  # noqa: E402
from steppe.experiments.data import datasets  # noqa: E402
from steppe.experiments.data.datasets import Dataset, Split  # noqa: E402
from steppe.experiments.errors import ExperimentError  # noqa: E402
from steppe.experiments.execution.progress import RunProgress  # noqa: E402
from steppe.experiments.storage.files import write_json  # noqa: E402
from steppe.experiments.storage.records import Record, read_records  # noqa: E402
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS  # noqa: E402
from steppe.experiments.tasks.images import images_task  # noqa: E402
from steppe.experiments.training.run import train  # noqa: E402
from steppe.experiments.training.stopping import Stop, Stopped, on_signals  # noqa: E402
from steppe.experiments.world import World, join  # noqa: E402

_ARTICLE = RECIPES["article"][0]
_SIZE = ("dataset", "batch_size")
"""Options that every recipe takes from that of the article."""
_SIZE_OF_RESNET = ("width", "stem_stride")
"""Further ones, for recipes with the article's network."""
_TINY_IMAGES = 320
_SECONDS_PER_PASS = 2.0  # assumed where the article's experiment has not been measured


def main() -> int:
    """Train, save the result when all runs are finished, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainings = {each.name: each.training for each in measurements() if each.training}
    parser.add_argument("name", choices=trainings)
    parser.add_argument("--interrupt", action="store_true", help="stop after the first evaluation, for the rehearsal")
    add_arguments(parser)
    args = parser.parse_args()
    register()
    training = tiny(trainings[args.name]) if args.tiny else trainings[args.name]
    runs = TrainingRuns(args.name, training, DeviceResults(args))
    try:
        runs.train(interrupt=args.interrupt)
    except Stopped:
        print("stopped; the next call resumes it")
        return UNFINISHED
    found = runs.result()
    results.save(args.name, found, args)
    shutil.rmtree(runs.folder)
    print(f"= {summary(found)}")
    return 0


def tiny(training: Training) -> Training:
    """Return the same training in a meaningless, tiny size."""
    return replace(training, epochs=2, extra_epochs=min(training.extra_epochs, 1), eval_every=1, minutes=None)


def summary(found: dict[str, Any]) -> str:
    """Return one line for all runs."""
    lines = []
    for run in found["runs"]:
        name = f"{run['setting']} {run['method']} seed {run['seed']}".strip()
        if "failed" in run:
            lines.append(f"{name} failed: {run['failed']}")
        else:
            end = run["records"][-1]
            lines.append(f"{name}: test {end['test_accuracy']:.2f} %, gap {end['gap']:.2f}, {end['seconds']:.0f} s")
    return "; ".join(lines)


class StoppingProgress(RunProgress):
    """Prints each evaluation, and stops the training where the flatness of the weights is to be measured.

    With `interrupt`, it sends SIGTERM after the first evaluation, to rehearse an interruption.
    """

    def __init__(self, run: Run, flatness_epochs: frozenset[int], *, interrupt: bool) -> None:
        super().__init__(Console(force_terminal=False), run.standardized_epochs)
        self._flatness_epochs, self._interrupt = flatness_epochs, interrupt

    def measured(self, run: Run, record: Record) -> None:
        """Print the evaluation; raise Stopped, which writes a checkpoint of exactly these weights, where needed."""
        super().measured(run, record)
        if self._interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
        if record.standardized_epoch in self._flatness_epochs:
            raise Stopped(signal.SIGTERM)


class TrainingRuns:
    """The runs of one measurement, in its folder."""

    def __init__(self, name: str, training: Training, device: DeviceResults) -> None:
        self.name, self.training, self.device = name, training, device
        self.args = device.arguments
        self.folder = device.run_folder(name)
        self.plan = self._plan()

    def recipes(self) -> Iterator[tuple[str, Recipe]]:
        """Yield each setting with its recipe for this device."""
        recipe = self._recipe().replace(epochs=self.plan["epochs"], extra_epochs=self.training.extra_epochs)
        for setting, fields in self.training.settings.items():
            yield setting, resolve(recipe.replace(**{**self.plan["configuration"], **fields}))

    def runs(self) -> Iterator[tuple[str, Run, Path]]:
        """Yield each run with the name of its setting and its folder."""
        for setting, recipe in self.recipes():
            for run in recipe.runs():
                yield setting, run, self.folder / "runs" / f"{setting}-{run.name}".removeprefix("-")

    def dataset(self) -> Dataset:
        """Return the images, on the CPU."""
        if not self.args.tiny:
            return datasets.load("fashion-mnist", self.args.data)
        full = datasets.load("sample")
        train, test = (Split(s.images[:_TINY_IMAGES], s.labels[:_TINY_IMAGES]) for s in (full.train, full.test))
        return replace(full, train=train, test=test)

    def train(self, *, interrupt: bool = False) -> None:
        """Train the runs that are not finished. Raises Stopped after a signal."""
        images = self.dataset().to(self.args.device)
        began = time.monotonic()
        try:
            with on_signals() as stop:
                for setting, run, folder in self.runs():
                    if not (folder / "outcome.json").exists():
                        self._finish(setting, run, folder, images, stop, interrupt)
        finally:
            self.plan["seconds"] += time.monotonic() - began
            self.plan["calls"] += 1
            write_json(self.folder / "plan.json", self.plan)

    def result(self) -> dict[str, Any]:
        """Return the plan and the outcome of each run."""
        recipes = {setting: recipe.replace(data_dir=None).to_json() for setting, recipe in self.recipes()}
        outcomes = [json.loads((folder / "outcome.json").read_text()) for *_, folder in self.runs()]
        return {**self.plan, "recipes": recipes, "runs": outcomes}

    def _recipe(self) -> Recipe:
        """Return the recipe of the training at the article's size, or at a tiny size, for any number of epochs."""
        recipe, training = RECIPES[self.training.recipe][0], self.training
        is_resnet = recipe.model.network == _ARTICLE.model.network
        size: dict[str, Any]
        if self.args.tiny:
            size = {"dataset": "sample", "batch_size": 64, "threads": 1}
            size |= {"width": 2, "stem_stride": 4} if is_resnet else {"width": 16}
        else:
            names = (*_SIZE, *(_SIZE_OF_RESNET if is_resnet else ()))
            size = {name: _ARTICLE.options()[name] for name in names} | {"data_dir": self.args.data}
        return recipe.replace(
            **size,
            **({"methods": tuple(training.methods)} if training.methods else {}),
            first_seed=training.seeds[0],
            seeds=len(training.seeds),
            eval_every=training.eval_every,
            device=self.args.device,
        )

    def _finish(self, setting: str, run: Run, folder: Path, images: Dataset, stop: Stop, interrupt: bool) -> None:
        """Train a run to its end and write its outcome; a run that fails does not stop the others."""
        with join(run.recipe.hardware.device, run.recipe.hardware.threads) as world:
            try:
                found = {"records": [r.to_json() for r in self._records(run, folder, images, world, stop, interrupt)]}
            except ExperimentError as error:
                found = {"failed": str(error)}
        measured = folder / "flatness.json"
        if measured.exists():
            found["flatness"] = json.loads(measured.read_text())
        write_json(folder / "outcome.json", {"setting": setting, "method": str(run.method), "seed": run.seed, **found})
        (folder / CHECKPOINT).unlink(missing_ok=True)

    def _records(
        self, run: Run, folder: Path, images: Dataset, world: World, stop: Stop, interrupt: bool
    ) -> list[Record]:
        """Train a run, interrupted for each measurement of its flatness; return its records."""
        file = folder / "flatness.json"
        ends = {run.recipe.comparison.epochs, run.standardized_epochs} if self.training.flatness else set()
        while True:
            known = json.loads(file.read_text()) if file.exists() else {}
            due = frozenset(end for end in ends if str(end) not in known)
            epoch = _last_epoch(folder)
            if (
                epoch in due and (folder / CHECKPOINT).exists()
            ):  # the checkpoint is missing if the folder was copied without it
                print(f"flatness after {epoch} standardized epochs", flush=True)
                found = flatness(run, folder, images, stop, tiny=self.args.tiny)
                write_json(file, {**known, str(epoch): found})
                continue
            try:
                with StoppingProgress(run, due, interrupt=interrupt) as progress:
                    task = images_task(images, run.recipe, robustness=True)
                    return train(run, folder, task, world, progress, stop)
            except Stopped:
                if stop:
                    raise

    def _plan(self) -> dict[str, Any]:
        """Return the plan of the first call: configuration, number of epochs, and the seconds spent so far."""
        without_graphs = (self.folder / WITHOUT_GRAPHS).exists()
        file = self.folder / "plan.json"
        if file.exists():
            plan = dict(json.loads(file.read_text()))
            if not without_graphs or plan["configuration"].get("cuda_graphs") is False:
                return plan
            shutil.rmtree(self.folder / "runs", ignore_errors=True)  # runs of the configuration that failed
        configuration = self._configuration() | ({"cuda_graphs": False} if without_graphs else {})
        epochs, reason = self._epochs()
        plan = {"configuration": configuration, "epochs": epochs, "fewer_epochs": reason, "seconds": 0.0, "calls": 0}
        write_json(file, plan)
        return plan

    def _configuration(self) -> dict[str, bool]:
        """Return the fastest configuration of `loop`, without the compiler, which would take minutes at every call."""
        fastest = (self.device.result("loop") or {}).get("fastest") or {"channels_last": True}
        known = ("amp", "channels_last") if fastest.get("compile") else ("amp", "channels_last", "cuda_graphs")
        return {name: fastest[name] for name in known if name in fastest}

    def _epochs(self) -> tuple[int, str | None]:
        """Return the number of standardized epochs, and the reason if they are fewer than planned."""
        training = self.training
        same = self.device.result(training.same_epochs_as) if training.same_epochs_as else None
        if same is not None:
            return same["epochs"], same["fewer_epochs"]
        if training.minutes is None:
            return training.epochs, None
        # a control has a part of the compute of the other runs
        trainings = float(sum(run.method.share for run in self._recipe().runs())) * len(training.settings)
        seconds, source = self._seconds_per_pass()
        most = int(training.minutes * 60 / (trainings * seconds)) // training.eval_every * training.eval_every
        epochs = max(min(training.epochs, most), training.eval_every)
        if epochs == training.epochs:
            return epochs, None
        reason = f"{epochs} of {training.epochs} standardized epochs, for {training.minutes:g} minutes"
        return epochs, f"{reason} at {seconds:.2g} s per pass ({source})"

    def _seconds_per_pass(self) -> tuple[float, str]:
        runs = (self.device.result("article-0") or {"runs": []})["runs"]
        ends = [run["records"][-1] for run in runs if "records" in run]
        if not ends:
            return _SECONDS_PER_PASS, "a guess: the article's experiment has no result"
        spent = sum(end["seconds"] for end in ends)
        return max(spent, 1e-3) / sum(end["standardized_epoch"] for end in ends), "as in the article's experiment"


def _last_epoch(folder: Path) -> int:
    """Return the standardized epoch of the last evaluation, 0 before the first one."""
    path = folder / METRICS
    records = read_records(path.read_text()) if path.exists() else []
    return records[-1].standardized_epoch if records else 0


if __name__ == "__main__":
    sys.exit(main())
