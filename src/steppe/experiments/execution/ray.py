"""Train runs on Ray: each is a task that trains into the shared run folder."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.resolve import fill_in, resolve
from steppe.experiments.errors import ExperimentError, first_line
from steppe.experiments.execution.executor import ExecutionOptions, MakeTask
from steppe.experiments.execution.pool import WorkerDied
from steppe.experiments.execution.workers import POLL_SECONDS, RunTask, WorkerExecutor, train_task
from steppe.experiments.world import has_bfloat16


@contextmanager
def connect(address: str | None) -> Iterator[Any]:
    """Provide the module `ray`, connected to a cluster or to a Ray of this machine; that one ends with the context."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ExperimentError("ray is not installed, and --on ray needs it: pip install 'steppe[ray]'") from error
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # in another thread, Ray sets no handler
            stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        if not ray.is_initialized():
            _initialize(ray, address or os.environ.get("RAY_ADDRESS") or "local")
            stack.callback(ray.shutdown)
        yield ray


def _initialize(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no reports to Ray's makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # small enough for a container: the store holds only the data set, 55 MB at most
    size = {"include_dashboard": False, "object_store_memory": 200 * 2**20} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **size)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = "a Ray on this machine could not be started" if size else f"there is no Ray at {address}"
        raise ExperimentError(
            f"{what} ({first_line(error)}): check --ray-address and $RAY_ADDRESS, or leave --on ray out"
        ) from error


class RayExecutor(WorkerExecutor[Any]):
    """Trains as many runs at a time as Ray's machines have room for; `ray` is the connected module."""

    def __init__(self, ray: Any, recipe: Recipe, options: ExecutionOptions, console: Console) -> None:
        super().__init__(recipe, console)
        self._ray, hardware = ray, recipe.hardware
        device = hardware.device
        if device == "auto":
            device = "cuda" if options.gpus_per_run != 0 and self._largest("GPU") > 0 else "cpu"
        self._gpus = (1.0 if device == "cuda" else 0.0) if options.gpus_per_run is None else options.gpus_per_run
        self._cpus = options.cpus_per_run or hardware.threads or 1
        if not self._capacity():
            largest = f"{self._largest('CPU'):g} CPUs and {self._largest('GPU'):g} GPUs"
            raise ExperimentError(
                f"a run takes {self._cpus} CPUs and {self._gpus:g} GPUs, and the largest of Ray's machines has "
                f"{largest}, so it would wait forever: lower --cpus-per-run (or --threads) or --gpus-per-run"
            )
        amp = hardware.amp
        if amp is None:  # this machine may have other instructions than those that train
            amp = ray.get(self._remote(has_bfloat16).remote(on_gpu=device == "cuda"))
        self._train = self._remote(train_task)
        recipe = recipe.replace(amp=amp, device=device)
        self.recipe = fill_in(recipe) if device == "cuda" else resolve(recipe)

    def _share(self, make_task: MakeTask) -> Any:
        return self._ray.put(make_task)  # in Ray's object store, so that the machines need no copy of the data set

    def _start(self, task: RunTask, shared: Any) -> Any:
        return self._train.remote(task, shared)

    def _wait(self, running: Sequence[Any]) -> list[Any]:
        return self._ray.wait(list(running), timeout=POLL_SECONDS)[0]  # type: ignore[no-any-return]

    def _result(self, worker: Any) -> str | None:
        try:
            return self._ray.get(worker)  # type: ignore[no-any-return]
        except self._ray.exceptions.RayTaskError:
            raise  # a bug, with the worker's traceback
        except self._ray.exceptions.RayError as died:
            raise WorkerDied(first_line(died)) from died

    def _kill(self, worker: Any) -> None:
        self._ray.cancel(worker, force=True)

    def _remote(self, function: Callable[..., Any]) -> Any:
        """Return the function as a Ray task with the resources of a run."""
        return self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0)(function)

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _largest(self, resource: str) -> float:
        return max((machine.get(resource, 0.0) for machine in self._machines()), default=0.0)

    def _capacity(self) -> int:
        needs = {"CPU": self._cpus, "GPU": self._gpus}
        return sum(
            min(math.floor(machine.get(resource, 0.0) / need) for resource, need in needs.items() if need)
            for machine in self._machines()
        )
