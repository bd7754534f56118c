"""Train one run, from its seed or its checkpoint, until its compute is spent."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steppe.averaging import Average, from_name
from steppe.experiments.config.methods import RunContext
from steppe.experiments.config.recipe import Run
from steppe.experiments.data.sampling import seed_of
from steppe.experiments.errors import ExperimentError, from_task, place, typed
from steppe.experiments.storage.checkpoints import CheckpointManager
from steppe.experiments.storage.records import AVERAGE, AVERAGED, HALVES, RECORD_FIELDS, Record, parse_records
from steppe.experiments.tasks.batches import Batch, Epochs
from steppe.experiments.tasks.failing import naming_samples, samples_of
from steppe.experiments.tasks.samples import (
    RandomStream,
    Samples,
    generators_restored,
    numpy_and_python_states,
    restore_numpy_and_python,
    seed_generators,
)
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.cuda_graphs import Step, Stepper, recorder
from steppe.experiments.training.evaluation import (
    as_number,
    evaluate,
    evaluating,
    flatness_sample,
    measure_flatness,
)
from steppe.experiments.training.forward import Forward
from steppe.experiments.training.optimizers import build_optimizer
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.second_task import measure_forgetting
from steppe.experiments.training.stopping import Stop, Stopped
from steppe.experiments.world import World, lost_connection

# A network that guesses has a loss of log(10) = 2.3. SAM skips steps that are not finite, so a diverged loss may stay
# at 1e17 and never become NaN.
_DIVERGED_LOSS = 1e4
_BATCHES_FOR_STATISTICS = 50
_STOP_INTERVAL = 8  # batches from one exchange of stop requests between several processes to the next


class Training:
    """The state of a run: its model, its optimizer and its progress."""

    def __init__(self, run: Run, task: Task, world: World) -> None:
        recipe = run.recipe
        self.run, self.task, self.world = run, task, world
        self.samples = {name: task.samples(name, run.seed).to(world.device) for name in task.splits}
        self._batch_size = recipe.training.batch_size or task.usual_batch_size(self.samples["train"])
        self._epochs = Epochs(self.samples["train"], self._batch_size, run.seed, world)
        seed_generators(seed_of(run.seed))
        torch.manual_seed(run.seed)  # of all devices
        layout = torch.channels_last if recipe.hardware.channels_last else torch.contiguous_format
        network = task.new_model().to(world.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.network = world.synchronize_norms(network)
        self.model = world.wrap(self.network)
        if recipe.hardware.compile:
            self.model.compile(dynamic=False)
        self._recorder = recorder(run, world, self.samples["train"])
        context = RunContext(
            rho=run.method.rho(recipe.training.rho),
            model=self.network,
            total_steps=run.steps(self.batches),
            samples=self.samples_per_epoch,
            classes=task.classes or 0,
            seed=run.seed,
            replay_rng=self._recorder is None,
        )
        self._planned_steps = context.total_steps
        self.optimizer, self.scheduler, self._clipping = build_optimizer(run, task, self.network, context)
        self.step_function = run.method.step_function(self.optimizer, context)
        self.average: Average | None = None
        """An average of the weights: that of the method, or the control beside a plain method."""
        # a step that is replayed as a CUDA graph does not update it
        if run.method.average or (self._begins_as_control and self._recorder is None):
            self.average = self._new_average()
        self._take_step = Stepper(self._eager_step, self.optimizer, self._recorder)
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
    def samples_per_epoch(self) -> int:
        """Samples in an epoch."""
        return self._epochs.samples

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return self._epochs.number

    @property
    def _begins_as_control(self) -> bool:
        """True if averaged weights are to be measured beside the run's own, as a free rival of other methods."""
        comparison = self.run.recipe.comparison
        is_reference = self.run.method == comparison.methods[0] and not self.run.method.average
        return is_reference and self.run.method.passes == 1 and len(comparison.methods) > 1

    def _new_average(self) -> Average:
        name = self.run.method.average or AVERAGE
        return from_name(name, self.network, self.optimizer, total_steps=self._planned_steps)

    def rest_of_epoch(self) -> Iterator[Batch]:
        """Yield the batches of the epoch in progress that are not finished."""
        return self._epochs.batches(self.epoch, self.batch)

    @property
    def samples_seen(self) -> int:
        """Samples in all steps so far; a sample counts once for each step that it is part of."""
        return self.epoch * self.samples_per_epoch + self._epochs.seen(self.batch)

    @property
    def finished(self) -> bool:
        return self.spent >= self.run.standardized_epochs * self.samples_per_epoch

    @property
    def standardized_epoch(self) -> float:
        return float(self.spent / self.samples_per_epoch)

    @property
    def due(self) -> list[int]:
        """The points of the grid that the compute has reached since the last measurement."""
        last = self.records[-1].standardized_epoch if self.records else 0
        reached = self.spent // self.samples_per_epoch
        return [point for point in self._grid if last < point <= reached]

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass that sets its precision."""
        amp = bool(self.run.recipe.hardware.amp)
        cached = self._recorder is None  # a CUDA graph would read copies that were made outside of it
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=amp, cache_enabled=cached)

    def step(self, batch: Batch) -> Tensor:
        """Take one optimizer step; return the loss at w as the mean over this process's share of the batch."""
        if self.world.size > 1:  # the states of the other processes are in no checkpoint
            seed_generators(seed := seed_of(self.run.seed, self.epoch, self.batch))
            torch.manual_seed(seed)  # of all devices
        with naming_samples(self.task, self.network, self.samples["train"], batch):
            loss, cost = self._take_step(batch)
        if not cost:
            raise RuntimeError(
                f"{type(self.step_function).__name__} took a step without evaluating the network through `forward`: "
                "nothing was counted, so the run would never end. Use `forward` for every pass"
            )
        if self._clipping is not None and self._clipping.steps == 0:
            raise ExperimentError(
                f"{self.run.name} takes its steps without the base optimizer, so clip={self.run.recipe.training.clip} "
                "would be ignored: leave --clip or this method out"
            )
        self.spent += cost
        self.steps += 1
        if self.scheduler is not None and self.steps < self._planned_steps:  # it ends there
            self.scheduler.step()
        self.epoch, self.batch = divmod(self.epoch * self.batches + self.batch + 1, self.batches)
        return loss

    def _eager_step(self, batch: Batch) -> Step:
        micro_batches = self.run.recipe.training.accumulate
        forward = Forward(self.task, self.model, batch, self.world, self.autocast, micro_batches)
        return Step(self.step_function.step(forward, batch).detach(), forward.cost())

    def measure(self, raise_if_stopped: Callable[[], None]) -> list[Record]:
        """Measure the model on all splits, for every point of the grid that is due."""
        recipe, measures = self.run.recipe, dict[str, float]()
        is_end, deciding = not self.run.ends.isdisjoint(self.due), self.task.info.deciding
        final: dict[str, float] = {}
        with self.averaged_weights() if self.run.method.average else nullcontext():
            for name, samples in self.samples.items():
                found = self._evaluate(samples, raise_if_stopped)
                # of the other splits, nothing is chosen
                dropped = () if name == "test" else HALVES
                measures |= {f"{name}_{key}": value for key, value in found.items() if not key.endswith(dropped)}
            if is_end:
                final |= self._final_measures(measures, raise_if_stopped)
        if self.average is not None and not self.run.method.average and recipe.comparison.epochs in self.due:
            with self.averaged_weights():
                found = self._evaluate(self.samples["test"], raise_if_stopped)
                averaged = {f"test_{deciding.name}": found[deciding.name]}
                averaged |= self._final_measures(averaged, raise_if_stopped)
            final |= {f"{name}{AVERAGED}": value for name, value in averaged.items()}
        train, test = measures[f"train_{deciding.name}"], measures[f"test_{deciding.name}"]
        measures["gap"] = deciding.advantage(train, test)
        flatness: dict[str, float] = {}
        if not self.run.flatness_grid.isdisjoint(self.due):
            number = recipe.evaluation.flatness_samples
            sample = flatness_sample(self.samples["train"], number, self.run.seed, self.world.device)
            flatness = measure_flatness(self.task, self.network, sample, recipe.training.rho, raise_if_stopped)
        # a step that crosses several points gives a record for each: methods are compared point by point
        return [
            Record(
                standardized_epoch=point,
                epoch=_number(Fraction(self.samples_seen, self.samples_per_epoch)),
                steps=self.steps,
                gradient_evaluations=_number(self.spent),
                passes=float(self.spent / self.samples_seen),
                measures={**measures, **(final if point in self.run.ends else {})},
                seconds=round(self.seconds, 3),
                images_per_second=round(self.samples_seen / max(self.seconds, 1e-9), 1),
                **(flatness if point in self.run.flatness_grid else {}),
            )
            for point in self.due
        ]

    def _final_measures(self, measures: Mapping[str, float], raise_if_stopped: Callable[[], None]) -> dict[str, float]:
        """Return further measures of the network as it is: the task's own, and what it forgets in a second task."""
        final: dict[str, float] = {}
        if self.task.final_measures is not None:
            with evaluating(self.network), RandomStream(0, 0, 0).active(), torch.no_grad(), self.autocast():
                final |= _final_numbers(self.task.final_measures(self.network, raise_if_stopped))
        if self.task.then is not None:
            state = (self.network, self.samples["test"], measures, self.world.device, self.autocast)
            final |= measure_forgetting(self.run, self.task, *state, raise_if_stopped)
        return final

    def _evaluate(self, samples: Samples, raise_if_stopped: Callable[[], None]) -> dict[str, float]:
        size = self.task.evaluation_batch_size or samples.batch_size or self._batch_size
        with RandomStream(0, 0, 0).active():  # a model or metric that draws must not change the training
            return evaluate(self.task, self.network, samples, size, self.world, self.autocast, raise_if_stopped)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the network its averaged weights, with BatchNorm statistics of their own, within the context."""
        assert self.average is not None
        batches = (batch.data for batch in islice(self._epochs.batches(0), _BATCHES_FOR_STATISTICS))
        self.average.refresh_statistics(batches, lambda module, data: self.task.outputs(module, data))
        with self.average.applied():
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        on_gpu = self.world.device.type == "cuda"
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step_function": self.step_function.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "rng": torch.get_rng_state(),
            "other_rngs": numpy_and_python_states(),
            "cuda_rng": torch.cuda.get_rng_state(self.world.device) if on_gpu else None,
            "epoch": self.epoch,
            "batch": self.batch,
            "steps": self.steps,
            "seconds": self.seconds,
            "spent": str(self.spent),
            "records": [record.to_json() for record in self.records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_function.load_state_dict(state["step_function"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if not self.run.method.average:
            # a run goes on as it began, whichever methods it is compared with by now
            self.average = None if state["average"] is None else self.average or self._new_average()
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._take_step.reset()  # graphs captured before would write to the old tensors
        torch.set_rng_state(state["rng"])
        restore_numpy_and_python(state["other_rngs"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.world.device)
        self.epoch, self.batch, self.steps = state["epoch"], state["batch"], state["steps"]
        self.seconds, self.spent = state["seconds"], Fraction(state["spent"])
        self.records = parse_records(state["records"])


@generators_restored()
def train(
    run: Run, folder: Path, task: Task, world: World, reporter: Reporter | None = None, stop: Stop | None = None
) -> list[Record]:
    """Train `run` to its end and return its measurements; resume at the checkpoint in `folder` if there is one.

    The recipe must be resolved.

    Raises:
        Stopped: once `stop` is set, after a checkpoint.
        ExperimentError: if the loss diverges, or if the checkpoint is damaged or of another run or configuration.
    """
    reporter, stop = reporter or Reporter(), Stop() if stop is None else stop
    manager = CheckpointManager(folder, run, world, task.initial_weights, partial(reporter.saved, run))
    training = Training(run, task, world)
    manager.resume(training.load_state_dict)
    reporter.begin(run, training.standardized_epoch, training.records)

    def raise_if_stopped() -> None:
        # several processes must stop at the same place, and may measure different numbers of chunks: they stop at the
        # next batch
        if stop and world.size == 1:
            raise Stopped(stop.signal)

    try:
        while training.due or not training.finished:
            if not training.due:
                _train_epoch(training, manager, reporter, stop)
            if training.due:
                training.records += training.measure(raise_if_stopped)
                reporter.measured(run, training.records[-1])
            manager.save(training.state_dict())
    except Stopped:
        manager.save(training.state_dict())
        raise
    except ExperimentError:
        raise
    except Exception as error:
        if not run.recipe.data.task or lost_connection(error) or not (from_task(error) or place(error)):
            raise
        raise ExperimentError(
            f"{run.name} ended in epoch {training.epoch + 1}, after step {training.steps:,}: the task's model, loss "
            f"or data raised an error ({typed(error)}){place(error)}{samples_of(error)}"
        ) from error
    reporter.end(run, training.records)
    return training.records


def _train_epoch(training: Training, manager: CheckpointManager, reporter: Reporter, stop: Stop) -> None:
    """Train to the end of the epoch in progress, or to a measurement within it."""
    run, world = training.run, training.world
    epoch, steps, seen, before = training.epoch, training.steps, training.samples_seen, training.seconds
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    begun = reported = time.perf_counter()
    for batch in training.rest_of_epoch():
        loss = training.step(batch)
        total += loss
        now = time.perf_counter()
        training.seconds = before + now - begun
        if now - reported > reporter.interval:
            reported = now
            speed = (training.samples_seen - seen) / (now - begun)
            reporter.step(run, training.standardized_epoch, float(loss), speed)
        if (world.size == 1 or training.batch % _STOP_INTERVAL == 0) and world.any(bool(stop)):
            raise Stopped(stop.signal or signal.SIGINT)  # 0 if only another process got the signal
        if training.due:
            break
        if training.batch > 0 and manager.due:  # train() saves at an epoch's end
            float(loss)  # waits for the device, whose pending work is training time, which saving is not
            saving = time.perf_counter()
            manager.save(training.state_dict())
            begun += time.perf_counter() - saving
    mean = float(world.total(total)) / world.size / (training.steps - steps)
    training.seconds = before + time.perf_counter() - begun  # float() has waited for the device
    # of a task of the user's own, the usual size is not known
    if not mean < (math.inf if run.recipe.data.task else _DIVERGED_LOSS):  # also if it is NaN
        options = run.recipe.training
        learning_rate = "" if options.lr is None else f" (it was {options.lr})"
        remedy = "Look for NaN in the data; if there is none, try" if run.recipe.data.task else "Try"
        raise ExperimentError(
            f"{run.name} diverged in epoch {epoch + 1}: its training loss is {mean:.3g}, so there is nothing to "
            f"compare. {remedy} a smaller --lr{learning_rate} or --rho ({options.rho}), and another folder with "
            "--out: this one keeps its other runs"
        )


def _final_numbers(measures: Mapping[str, Any]) -> dict[str, float]:
    """Check what a user's function returned; as numbers of Python, which are all that a record holds."""
    taken = [name for name in measures if name in RECORD_FIELDS]
    if taken:
        raise ExperimentError(f"final_measures returned {taken[0]!r}, which every record has already: rename it")
    return {name: as_number(f"the final measure {name}", value) for name, value in measures.items()}


def _number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)
