"""A Ray cluster of three machines that this one simulates; run as a script, it trains on them.

Python of the two worker machines cannot open anything below the folder of the script's argument: neither the run
folder nor the user's module, which is there.
"""

import io
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from executing import worker
from rich.console import Console
from tiny import RecordingReporter

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.execution.executor import ExecutionOptions, Job
from steppe.experiments.execution.launch import start_executor
from steppe.experiments.execution.prepared_task import prepare_task
from steppe.experiments.tasks.load import with_task
from steppe.experiments.training.stopping import Stop, Stopped

MODULE = """
import torch
import user_helpers
from steppe.experiments import Task
from steppe import SAM

def task():
    inputs, targets = user_helpers.data()
    return Task(
        model=lambda: torch.nn.Linear(6, 1),
        train=(inputs[:512], targets[:512]),
        test=(inputs[512:], targets[512:]),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
        loss=user_helpers.slow_loss,
    )

def own_sam(optimizer, rho=0.05):
    return SAM(optimizer, rho=rho)
"""
HELPERS = """
import time
from pathlib import Path
import torch
import torch.nn.functional as F

def data():
    Path(__file__).read_text()  # a file beside the module
    x = torch.randn(600, 6)
    return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(600, 1)

def slow_loss(outputs, targets):
    time.sleep(0.01)
    return F.mse_loss(outputs, targets)
"""
HIDE = """
import sys

def hide(event, arguments, folder=FOLDER):
    if event in ("open", "os.mkdir", "os.listdir") and str(arguments[0]).startswith(folder):
        raise FileNotFoundError(2, "this machine does not see it", str(arguments[0]))

sys.addaudithook(hide)
"""


def write_module(folder: Path) -> None:
    (folder / "user_task.py").write_text(MODULE)
    (folder / "user_helpers.py").write_text(HELPERS)


def recipe_of(out: Path) -> Recipe:
    fields: dict[str, Any] = {"task": "user_task:task", "methods": ("sgd", "user_task:own_sam"), "seeds": 2}
    fields |= {"epochs": 6, "extra_epochs": 0, "eval_every": 3, "batch_size": 16, "checkpoint_seconds": 0.2}
    return Recipe().replace(out=out, **fields, device="cpu", threads=1, amp=False, cuda_graphs=False)


def jobs(of: Recipe) -> list[Job]:
    return [Job(run, of.folder / "runs" / run.name) for run in of.runs()]


class Begins(RecordingReporter):
    """Records where each run begins, and where it begins again."""

    def __init__(self) -> None:
        super().__init__()
        self.begins = defaultdict[str, list[float]](list)

    def begin(self, run: Run, standardized_epoch: float, records: object) -> None:
        self.begins[run.name].append(standardized_epoch)


class Cluster:
    def __init__(self, hidden: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.TemporaryDirectory()
        (Path(self._folder.name) / "sitecustomize.py").write_text(HIDE.replace("FOLDER", repr(str(hidden))))
        size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        self._cluster = Cluster(True, head_node_args=size | {"include_dashboard": False})
        environment = {"PYTHONPATH": self._folder.name}
        self.workers = [self._cluster.add_node(**size, env_vars=environment) for _ in range(2)]
        self.address = self._cluster.address

    def node_of(self, pid: int) -> Any:
        """Return the worker machine of a process; None if it is one of the head."""
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in self.workers}
        return raylets.get(parent)

    def kill(self, node: Any) -> None:
        self.workers.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()
        self._folder.cleanup()


def has_begun(folder: Path) -> bool:
    """True if the run has a checkpoint within an epoch."""
    with suppress(OSError, RuntimeError):
        return bool(torch.load(folder / "checkpoint.pt", weights_only=True)["batch"])
    return False


def kill_a_machine(cluster: Cluster, work: list[Job], killed: list[str]) -> None:
    """Kill one of the machines that do not see the folder, when a run on it has a checkpoint within an epoch."""
    while not killed:
        time.sleep(0.02)
        for job in work:
            with suppress(OSError, IndexError):
                node = cluster.node_of(worker(job.folder))
                if node is not None and has_begun(job.folder):
                    cluster.kill(node)
                    killed.append(job.run.name)
                    return


def main(folder: Path) -> None:
    os.chdir(folder)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    console = Console(file=io.StringIO(), width=1000)
    cluster, found = Cluster(folder), dict[str, Any]()
    try:
        of, task = with_task(recipe_of(folder / "killed"))
        with start_executor(of, ExecutionOptions("ray", ray_address=cluster.address), console) as executor:
            make_task = prepare_task(executor, of.folder, console, task)
            work, killed = jobs(executor.recipe), list[str]()
            threading.Thread(target=kill_a_machine, args=(cluster, work, killed), daemon=True).start()
            reporter = Begins()
            outcomes = list(executor.run(work, make_task, of.folder, reporter, Stop()))
            found |= {"killed": killed, "errors": [outcome.error for outcome in outcomes], "begins": reporter.begins}

            work, stop = jobs(executor.recipe.replace(out=folder / "stopped")), Stop()

            class StopAtTheFirstStep(RecordingReporter):
                """Requests a stop when a machine that does not see the folder trains."""

                def step(self, run: Run, *values: Any) -> None:
                    with suppress(OSError, IndexError):
                        if cluster.node_of(worker(folder / "stopped" / "runs" / run.name)):
                            stop.signal = 2

            try:
                list(executor.run(work, make_task, folder / "stopped", StopAtTheFirstStep(), stop))
            except Stopped:
                found["stopped"] = [job.run.name for job in work if has_begun(job.folder)]
        found["printed"] = console.file.getvalue()  # type: ignore[attr-defined]
    finally:
        cluster.shutdown()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
