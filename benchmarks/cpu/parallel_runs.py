"""Time several processes that train at the same time."""

import multiprocessing
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from cpu.configurations import Configuration, Row, Sizes, training_step
from timing import in_turns, spread


def measure_parallel_runs(sizes: Sizes, cores: int) -> list[Row]:
    """Compare one run on all cores with one run on each: steps per second of all runs, and the ratio to the first."""
    cases = [
        (processes, Configuration(threads, *how))
        for how in ((False, False), (True, True))
        for processes, threads in dict.fromkeys([(1, cores), (1, 1), (cores, 1)])
    ]
    cases = [(processes, configuration) for processes, configuration in cases if configuration.safe(sizes.width)]
    steps = 10 * sizes.repeat
    with ExitStack() as stack:
        functions: dict[str, Callable[[], object]] = {}
        for processes, configuration in cases:
            group = stack.enter_context(TrainingProcesses(processes, configuration, sizes))
            functions[str((processes, configuration))] = lambda group=group: group.train(steps)  # type: ignore[misc]
        times = in_turns(functions, sizes.rounds)
    # seconds of one step, where several processes take steps at the same time
    per_step = [[t / (case[0] * steps) for t in times[str(case)]] for case in cases]
    return [
        {"processes": processes, **asdict(configuration), **spread(own, per_step[0])}
        for (processes, configuration), own in zip(cases, per_step, strict=True)
    ]


class TrainingProcesses:
    """Processes that all take the requested number of steps at the same time."""

    def __init__(self, processes: int, configuration: Configuration, sizes: Sizes) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(processes):
            own, other = spawn.Pipe()
            self._processes.append(spawn.Process(target=_serve, args=(other, configuration, sizes), daemon=True))
            self._processes[-1].start()
            self._pipes.append(own)
        for pipe in self._pipes:
            pipe.recv()  # the process has warmed up

    def train(self, steps: int) -> float:
        """Take `steps` steps in every process; return the seconds."""
        begin = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(steps)
        for pipe in self._pipes:
            pipe.recv()
        return time.perf_counter() - begin

    def __enter__(self) -> "TrainingProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, configuration: Configuration, sizes: Sizes) -> None:
    step = training_step(configuration, sizes.batch, sizes.width)
    step()
    pipe.send(None)
    while True:
        for _ in range(pipe.recv()):
            step()
        pipe.send(None)
