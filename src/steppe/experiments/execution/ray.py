"""Train runs on Ray: each is a task, which trains into the run folder or sends what it writes."""

import math
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.resolve import fill_in, resolve
from steppe.experiments.errors import ExperimentError, first_line
from steppe.experiments.execution.by_value import pack_run, pack_task
from steppe.experiments.execution.executor import ExecutionOptions, MakeTask
from steppe.experiments.execution.pool import WorkerDied
from steppe.experiments.execution.progress import print_line
from steppe.experiments.execution.transfer import Receiver, sees, train_anywhere
from steppe.experiments.execution.workers import POLL_SECONDS, RunTask, WorkerExecutor
from steppe.experiments.world import has_bfloat16

_LOOK_SECONDS = 120.0


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
        with _on_loopback() if size else nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **size)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = "a Ray on this machine could not be started" if size else f"there is no Ray at {address}"
        raise ExperimentError(
            f"{what} ({first_line(error)}): check --ray-address and $RAY_ADDRESS, or leave --on ray out"
        ) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started within the context listen on the loopback interface only.

    Its servers have no password. With any IP address of this machine they listen on all interfaces, and Ray replaces a
    127.0.0.1 that it is given by such an address, unless this private constant is false, as it is on macOS.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


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
        self._train = self._remote(train_anywhere)
        recipe = recipe.replace(amp=amp, device=device)
        self.recipe = fill_in(recipe) if device == "cuda" else resolve(recipe)

    def _share(self, make_task: MakeTask, control: Path, stop_file: Path) -> AbstractContextManager["_Session"]:
        return _Session(self._ray, make_task, control, stop_file, self._console)

    def _start(self, task: RunTask, shared: "_Session") -> Any:
        return self._train.remote(*shared.arguments(task))

    def _wait(self, running: Sequence[Any]) -> list[Any]:
        return self._ray.wait(list(running), timeout=POLL_SECONDS)[0]  # type: ignore[no-any-return]

    def _result(self, worker: Any) -> str | None:
        try:
            return self._ray.get(worker)  # type: ignore[no-any-return]
        except self._ray.exceptions.RayTaskError:
            raise  # a bug, with the worker's traceback
        except self._ray.exceptions.RayError as died:
            # its further sentences name Ray's own tools
            raise WorkerDied(first_line(died).partition(". ")[0]) from died

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


class _Session:
    """What the machines of Ray need for some runs: the task, and the way to the run folder.

    Machines that do not see the folder send the results to a `Receiver` on this one. If there are other machines than
    this one, the user's code is sent along.
    """

    def __init__(self, ray: Any, make_task: MakeTask, control: Path, stop_file: Path, console: Console) -> None:
        self._ray, self._make_task, self._stop_file, self._console = ray, make_task, stop_file, console
        self._token = control / f".shared-{uuid.uuid4().hex[:12]}"
        self._sees: dict[str, bool] = {}
        """The machines by their ids in Ray, and whether they see the folder."""
        self._distributed = False
        self._task: Any = None
        self._receiver: Any = None

    def __enter__(self) -> Self:
        self._token.parent.mkdir(parents=True, exist_ok=True)
        self._token.write_text(self._token.name)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._receiver is not None:
            with suppress(Exception):
                self._ray.kill(self._receiver)
        self._token.unlink(missing_ok=True)

    def arguments(self, task: RunTask) -> tuple[Any, ...]:
        """Return the arguments of `train_anywhere` for a run that starts, or starts again."""
        self._look()
        if self._task is None:  # in Ray's object store, so that the machines need no copy of the data set
            self._task = self._ray.put(pack_task(self._make_task) if self._distributed else self._make_task)
        if self._distributed:
            task = replace(task, job=replace(task.job, run=pack_run(task.job.run)))
        attempt = uuid.uuid4().hex
        if self._receiver is not None:
            self._ray.get(self._receiver.expect.remote(task.job.folder, attempt))
        return task, self._task, self._token, self._receiver, attempt

    def _look(self) -> None:
        """Find out which of the machines that have joined Ray see the run folder."""
        here = self._ray.get_runtime_context().get_node_id()
        nodes = [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]
        new = [node for node in nodes if node not in self._sees]
        if nodes == [here] or not new:
            return
        if not self._distributed:
            self._distributed, self._task = True, None
        answers = {node: self._on(node, sees).remote(self._token) for node in new}
        for node, answer in answers.items():
            with suppress(self._ray.exceptions.RayError):  # it has left; if not, it is looked at again
                self._sees[node] = self._ray.get(answer, timeout=_LOOK_SECONDS)
        apart = [node for node in nodes if not self._sees.get(node, True)]
        if not apart:
            print_line(self._console, f"Ray: all {len(nodes)} machines see {self._token.parent}, and write there")
            return
        if not self._sees.get(here, False):
            raise ExperimentError(
                f"the machine that the command is connected to Ray by does not see {self._token.parent}, so results "
                "cannot be written there: start the command on a machine of the cluster"
            )
        if self._receiver is None:
            self._receiver = self._on(here, Receiver).remote(self._stop_file)
        print_line(
            self._console,
            f"Ray: {len(apart)} of {len(nodes)} machines do not see {self._token.parent}: their runs send their "
            "checkpoints and measurements to this machine",
        )

    def _on(self, node: str, remote: Callable[..., Any]) -> Any:
        """Return the function or the class as Ray's, on one machine."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        return self._ray.remote(num_cpus=0, scheduling_strategy=strategy)(remote)
