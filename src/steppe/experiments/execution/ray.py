"""Runs on Ray: each is a task that trains into the shared run folder; a run whose worker dies goes on in another."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.execution.workers import TICK, Task, WorkerDied, Workers, work
from steppe.experiments.world import filled, has_bfloat16, resolve

__all__ = ["OnRay"]


class OnRay(Workers[Any]):
    """Hands jobs to Ray, as many at a time as its machines have room for. Use it as a context manager."""

    def __init__(self, recipe: Recipe, where: ExecutionOptions, console: Console) -> None:
        super().__init__(recipe, console)
        self._where = where
        self._cpus, self._gpus = 1, 0.0
        self._stack = ExitStack()
        self._data: Any = None
        self._work: Any = None

    def __enter__(self) -> Self:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ExperimentError("ray is not installed, and --on ray needs it: pip install 'steppe[ray]'") from error
        self._ray: Any = ray
        with ExitStack() as stack:
            stack.enter_context(_signals_kept())
            if not ray.is_initialized():
                self._connect()
                stack.callback(ray.shutdown)
            self._settle()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave Ray; one that was started for this command ends."""
        self._stack.close()

    def _share(self, data: Dataset) -> None:
        # workers need no copy of the data set on their machine, and cannot have another one
        self._data, self._work = self._ray.put(data), self._remote(work)

    def _begin(self, task: Task) -> Any:
        return self._work.remote(task, self._data)

    def _wait(self, running: Sequence[Any]) -> list[Any]:
        done: list[Any] = self._ray.wait(list(running), timeout=TICK)[0]
        return done

    def _end(self, worker: Any) -> str | None:
        try:
            result: str | None = self._ray.get(worker)
        except self._ray.exceptions.RayTaskError:
            raise  # a mistake in the program, with the worker's traceback
        except self._ray.exceptions.RayError as died:
            raise WorkerDied(_reason(died)) from died
        return result

    def _drop(self, worker: Any) -> None:
        self._ray.cancel(worker, force=True)

    def _remote(self, function: Callable[..., Any]) -> Any:
        """The function as Ray does it, with what a run takes."""
        return self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0)(function)

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for reports to Ray's makers
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        address = self._where.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        # small enough for a container: the store holds the data set, 55 MB at most, and nothing else
        size = {"include_dashboard": False, "object_store_memory": 200 * 2**20} if address == "local" else {}
        try:
            self._ray.init(address=address, **quiet, **size)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = "a Ray on this machine could not be started" if size else f"there is no Ray at {address}"
            raise ExperimentError(
                f"{what} ({reason}): check --ray-address and $RAY_ADDRESS, or leave --on ray out"
            ) from error

    def _settle(self) -> None:
        """Say what `auto` means on Ray's machines, and what a run takes of them."""
        recipe, where = self.recipe, self._where
        device = recipe.device
        if device == "auto":
            device = "cuda" if where.gpus_per_run != 0 and self._most("GPU") > 0 else "cpu"
        self._gpus = (1.0 if device == "cuda" else 0.0) if where.gpus_per_run is None else where.gpus_per_run
        self._cpus = where.cpus_per_run or recipe.threads or 1
        if not self._room():
            most = f"{self._most('CPU'):g} CPUs and {self._most('GPU'):g} GPUs"
            raise ExperimentError(
                f"a run takes {self._cpus} CPUs and {self._gpus:g} GPUs, and the largest of Ray's machines has {most}, "
                "so it would wait for ever: lower --cpus-per-run (or --threads) or --gpus-per-run"
            )
        if recipe.amp is None:  # this machine may have other instructions than those that train
            amp = self._ray.get(self._remote(has_bfloat16).remote(on_gpu=device == "cuda"))
            recipe = replace(recipe, amp=amp)
        recipe = replace(recipe, device=device)
        self.recipe = filled(recipe) if device == "cuda" else resolve(recipe)

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _most(self, what: str) -> float:
        return max((machine.get(what, 0.0) for machine in self._machines()), default=0.0)

    def _room(self) -> int:
        """How many runs Ray's machines take at a time."""
        needs = {"CPU": self._cpus, "GPU": self._gpus}
        return sum(
            min(math.floor(machine.get(what, 0.0) / need) for what, need in needs.items() if need)
            for machine in self._machines()
        )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back what SIGTERM did: Ray takes it over when it starts, and keeps it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # elsewhere Ray could not change it
            signal.signal(signal.SIGTERM, before)


def _reason(died: Exception) -> str:
    return next(iter(str(died).strip().splitlines()), type(died).__name__).rstrip(".")
