"""Train one unit: from its seed or its checkpoint until its compute is spent, with a measurement every so often."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe.experiments.config.methods import BASES, RunContext
from steppe.experiments.config.recipe import Run
from steppe.experiments.data.batches import Batch, batches, count, order, start
from steppe.experiments.data.datasets import CLASSES, Dataset
from steppe.experiments.data.few_shot import few_shot
from steppe.experiments.data.label_noise import mislabeled
from steppe.experiments.errors import ExperimentError
from steppe.experiments.models.backbones import FineTuned
from steppe.experiments.models.preact_resnet import preact_resnet18
from steppe.experiments.storage import checkpoints
from steppe.experiments.storage.files import write_atomically
from steppe.experiments.storage.records import Record, write_records
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS
from steppe.experiments.training.cuda_graphs import Graphs, Step, recorder
from steppe.experiments.training.evaluation import evaluate
from steppe.experiments.training.forward import Forward
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.sharpness import flatness_sample, measure_flatness
from steppe.experiments.training.stopping import Stop, Stopped
from steppe.experiments.world import World

__all__ = ["Run", "owner", "train"]

# A guess costs log(10) = 2.3. SAM skips steps that are not finite, so with it a loss may stay at 1e17 for ever.
_HOPELESS = 1e4
_ASK_EVERY = 8  # batches between two questions to the other processes whether to stop


class Training:
    """A unit in motion: its network and optimizer, and how far they have come."""

    def __init__(self, run: Run, data: Dataset, world: World) -> None:
        recipe = run.recipe
        if recipe.data.shots is not None:
            data = replace(data, train=few_shot(data.train, recipe.data.shots, run.seed))
        if recipe.data.label_noise:
            data = replace(data, train=mislabeled(data.train, recipe.data.label_noise, run.seed))
        self.run, self.data, self.world = run, data, world
        torch.manual_seed(run.seed)
        network = _network(run, data)
        layout = torch.channels_last if recipe.hardware.channels_last else torch.contiguous_format
        network = world.synchronize_norms(network.to(world.device).to(memory_format=layout))  # type: ignore[call-overload]
        self.network = network
        self.model = world.wrap(network)
        if recipe.hardware.compile:
            self.model.compile(dynamic=False)
        trained = network.groups(recipe.training.head_lr) if isinstance(network, FineTuned) else network.parameters()
        on_gpu = world.device.type == "cuda"
        base = BASES[recipe.training.base].build(
            trained, recipe.training.lr, recipe.base_momentum, recipe.training.weight_decay, on_gpu=on_gpu
        )
        self._recorder = recorder(run, world)
        setting = RunContext(
            rho=run.method.rho(recipe.training.rho),
            model=network,
            total_steps=run.steps(self.images),
            samples=self.images,
            classes=len(CLASSES),
            seed=run.seed,
            replay_rng=self._recorder is None,
        )
        self.optimizer = run.method.optimizer(base, setting)
        _check(run, self.optimizer)
        self.step_function = run.method.step_function(self.optimizer, setting)
        self._take = self._way()
        self.epoch = 0
        """Finished epochs."""
        self.batch = 0
        """Finished batches of the epoch in progress."""
        self.steps = 0
        self.seconds = 0.0
        self.spent = Fraction(0)
        """Gradient evaluations of all processes together."""
        self.records: list[Record] = []
        self._grid = run.grid

    @property
    def images(self) -> int:
        """Images in an epoch."""
        return len(self.data.train)

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return count(self.images, self.run.recipe.training.batch_size)

    @property
    def seen(self) -> int:
        """Images that steps were taken on, each as often as it was met."""
        return self.epoch * self.images + start(self.batch, self.images, self.batches)

    @property
    def finished(self) -> bool:
        """Whether the compute is spent."""
        return self.spent >= self.run.standardized_epochs * self.images

    @property
    def standardized_epoch(self) -> float:
        """Compute so far, in standardized epochs."""
        return float(self.spent / self.images)

    @property
    def due(self) -> list[int]:
        """The points of the grid that the compute has reached since the last measurement."""
        last = self.records[-1].standardized_epoch if self.records else 0
        reached = self.spent // self.images
        return [point for point in self._grid if last < point <= reached]

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of a forward pass."""
        # a graph must not find copies of the weights that were made outside of it
        cached = self._recorder is None
        amp = bool(self.run.recipe.hardware.amp)
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=amp, cache_enabled=cached)

    def step(self, batch: Batch) -> Tensor:
        """Take one optimizer step; return the loss at w as the mean over this process's share of the batch."""
        loss, cost = self._take(batch)
        if not cost:
            raise RuntimeError(
                f"{type(self.step_function).__name__} took a step without evaluating the network through the `forward` it was "
                "given: nothing was counted, so the run would never end. Use it for every pass"
            )
        self.spent += cost
        self.steps += 1
        self.epoch, self.batch = divmod(self.epoch * self.batches + self.batch + 1, self.batches)
        return loss

    def _way(self) -> Callable[[Batch], Step]:
        if self._recorder is None:
            return self._launch
        return Graphs(self._launch, self.optimizer, self._recorder)

    def _launch(self, batch: Batch) -> Step:
        forward = Forward(self.model, batch, self.world, self.autocast)
        loss = self.step_function.step(forward, batch).detach()
        return Step(loss, forward.cost())

    def measure(self, pause: Callable[[], None]) -> list[Record]:
        """Measure the network on both splits, for every point of the grid that is due."""
        train, test = (
            evaluate(self.network, split, self.world, self.autocast, pause)
            for split in (self.data.train, self.data.test)
        )
        flatness: dict[str, float] = {}
        if not self.run.flatness_grid.isdisjoint(self.due):
            recipe = self.run.recipe
            sample = flatness_sample(self.data.train, recipe.evaluation.flatness_samples, self.run.seed)
            flatness = measure_flatness(self.network, sample, recipe.training.rho, pause)
        # a step that crosses several points gives each its record: methods are compared point by point
        return [
            Record(
                standardized_epoch=point,
                epoch=_number(Fraction(self.seen, self.images)),
                steps=self.steps,
                gradient_evaluations=_number(self.spent),
                passes=float(self.spent / self.seen),
                train_loss=train.loss,
                train_accuracy=train.accuracy,
                test_loss=test.loss,
                test_accuracy=test.accuracy,
                gap=train.accuracy - test.accuracy,
                seconds=round(self.seconds, 3),
                images_per_second=round(self.seen / max(self.seconds, 1e-9), 1),
                **(flatness if point in self.run.flatness_grid else {}),
            )
            for point in self.due
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        on_gpu = self.world.device.type == "cuda"
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "driver": self.step_function.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.world.device) if on_gpu else None,
            "epoch": self.epoch,
            "batch": self.batch,
            "steps": self.steps,
            "seconds": self.seconds,
            "spent": str(self.spent),
            "records": [record.to_json() for record in self.records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_function.load_state_dict(state["driver"])
        self._take = self._way()  # a graph writes to the tensors that were there before
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.world.device)
        self.epoch, self.batch, self.steps = state["epoch"], state["batch"], state["steps"]
        self.seconds, self.spent = state["seconds"], Fraction(state["spent"])
        self.records = [Record(**record) for record in state["records"]]


def train(
    run: Run, folder: Path, data: Dataset, world: World, reporter: Reporter | None = None, stop: Stop | None = None
) -> list[Record]:
    """Train `run` to its end and return its measurements; go on from `folder`'s checkpoint if there is one.

    `data` lies on the device of `world`, and the unit's recipe is resolved. Raises Stopped when `stop` was asked for,
    and ExperimentError when the loss diverges, or when the checkpoint is damaged or belongs to another unit or
    configuration; the folder can be used again after each of them.
    """
    reporter, stop = reporter or Reporter(), Stop() if stop is None else stop
    manager = CheckpointManager(folder, run, world, None if data.start is None else data.start.digest())
    training = Training(run, data, world)
    manager.restore(training)
    reporter.begin(run, training.standardized_epoch, training.records)
    pause = _pause(stop, world)
    try:
        while training.due or not training.finished:
            if not training.due:
                _train_on(training, manager, reporter, stop)
            if training.due:
                training.records += training.measure(pause)
                reporter.measured(run, training.records[-1])
            manager.save(training)
    except Stopped:
        manager.save(training)
        raise
    reporter.end(run, training.records)
    return training.records


def _network(run: Run, data: Dataset) -> nn.Module:
    recipe = run.recipe
    if (data.start is None) != (recipe.model.backbone == "none"):
        raise RuntimeError(
            f"backbone={recipe.model.backbone}, but the data came with {data.start}: use finetune.with_start"
        )
    if data.start is not None:
        return data.start.network(freeze=recipe.model.freeze)
    return preact_resnet18(recipe.model.width, stem_stride=recipe.model.stem_stride, norm=recipe.model.norm)


def _check(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what a fine-tuning would silently do without: ExperimentError."""
    recipe = run.recipe
    climbing = getattr(getattr(optimizer, "perturbation", None), "parameters", ())
    if climbing and not any(p.requires_grad for p in climbing):
        raise ExperimentError(
            f"{run.name} climbs with weights that --freeze keeps as they are, so it would be the plain base optimizer "
            "at twice the price: leave --freeze or this method out"
        )
    if recipe.training.head_lr is not None and all(
        group["lr"] != recipe.training.head_lr for group in optimizer.param_groups
    ):
        raise ExperimentError(
            f"{run.name} has one learning rate of its own, and head_lr={recipe.training.head_lr} would be ignored: leave "
            "--head-lr or this method out"
        )


def owner(run: Run, processes: int, start: str | None) -> str:
    """Whose a checkpoint is: everything that the run's result depends on, with the digest of what it starts from."""
    begun = {} if start is None else {"start": start}
    depends_on = json.dumps(run.recipe.result() | {"processes": processes} | begun, sort_keys=True)
    return f"{run.name} of {depends_on}"


def _pause(stop: Stop, world: World) -> Callable[[], None]:
    def pause() -> None:
        # processes with different numbers of chunks could not agree here: together they stop at the next batch
        if stop and world.size == 1:
            raise Stopped(stop.signal)

    return pause


def _number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)


def _train_on(training: Training, manager: CheckpointManager, reporter: Reporter, stop: Stop) -> None:
    """Train to the end of the epoch in progress, or to a measurement within it."""
    run, world = training.run, training.world
    epoch, steps, seen, before = training.epoch, training.steps, training.seen, training.seconds
    indices = order(training.images, run.seed, epoch)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    begun, told = time.perf_counter(), time.perf_counter()
    for batch in batches(training.data.train, run.recipe.training.batch_size, indices, world, training.batch, epoch):
        loss = training.step(batch)
        total += loss
        now = time.perf_counter()
        training.seconds = before + now - begun
        if now - told > reporter.interval:
            told = now
            speed = (training.seen - seen) / (now - begun)
            reporter.step(run, training.standardized_epoch, float(loss), speed)
        if (world.size == 1 or training.batch % _ASK_EVERY == 0) and world.any(bool(stop)):
            raise Stopped(stop.signal or 2)
        if training.due:
            break
        if manager.due(training):
            float(loss)  # wait for the device: what it still computes is training, and saving is not
            saving = time.perf_counter()
            manager.save(training)
            begun += time.perf_counter() - saving
    mean = float(world.total(total)) / world.size / (training.steps - steps)
    training.seconds = before + time.perf_counter() - begun  # on a GPU, the work ends here
    if not mean < _HOPELESS:  # nor is NaN
        raise ExperimentError(
            f"{run.name} diverged in epoch {epoch + 1}: its training loss is {mean:.3g}, so there is nothing to "
            f"compare. Try a smaller --lr (it was {run.recipe.training.lr}) or --rho ({run.recipe.training.rho}), and another folder "
            "with --out: this one keeps its other runs"
        )


class CheckpointManager:
    """Keeps a run's checkpoint and metrics in its folder; only the first process writes."""

    def __init__(self, folder: Path, run: Run, world: World, start: str | None) -> None:
        self._folder, self._world = folder, world
        self._owner = owner(run, world.size, start)
        self._saved = time.monotonic()

    def restore(self, training: Training) -> None:
        """Take `training` to where the checkpoint is, and cut the metrics to what it knows."""
        path = self._folder / CHECKPOINT
        if path.exists():
            training.load_state_dict(checkpoints.load(path, self._owner))
        if self._world.rank == 0:
            write_atomically(self._folder / METRICS, write_records(training.records))
        self._world.barrier()

    def save(self, training: Training) -> None:
        """Save a checkpoint, and the metrics that belong to it."""
        if self._world.rank == 0:
            checkpoints.save(self._folder / CHECKPOINT, self._owner, training.state_dict())
            write_atomically(self._folder / METRICS, write_records(training.records))
        self._saved = time.monotonic()

    def due(self, training: Training) -> bool:
        """Whether the last time was `checkpoint_seconds` ago; the epoch's end saves anyway."""
        return training.batch > 0 and time.monotonic() - self._saved >= training.run.recipe.output.checkpoint_seconds
