"""Several processes that train at the same moment."""

import multiprocessing
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from cpu.choices import Choice, Row, Sizes, step
from timing import in_turns, spread


def at_once(sizes: Sizes, cores: int) -> list[Row]:
    """One run on all cores, against one on each: steps a second of all together, and the ratio to the first."""
    ways = [
        (processes, Choice(threads, *how))
        for how in ((False, False), (True, True))
        for processes, threads in dict.fromkeys([(1, cores), (1, 1), (cores, 1)])
    ]
    number = 10 * sizes.repeat
    with ExitStack() as stack:
        made: dict[str, Callable[[], object]] = {}
        for processes, choice in ways:
            if choice.safe(sizes.width):
                team = stack.enter_context(Team(processes, choice, sizes))
                made[str((processes, choice))] = lambda team=team: team.train(number)  # type: ignore[misc]
        times = in_turns(made, sizes.rounds)
    # seconds of a step, when several are made at a time
    each = {str((n, c)): [t / (n * number) for t in times[str((n, c))]] for n, c in ways if str((n, c)) in times}
    beside = each[str(ways[0])]
    return [
        {"processes": n, **asdict(choice), **spread(each[str((n, choice))], beside)}
        for n, choice in ways
        if str((n, choice)) in each
    ]


class Team:
    """Processes that wait for a word, and then all make so many steps."""

    def __init__(self, processes: int, choice: Choice, sizes: Sizes) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._members: list[Any] = []
        for _ in range(processes):
            ours, theirs = spawn.Pipe()
            self._members.append(spawn.Process(target=_serve, args=(theirs, choice, sizes), daemon=True))
            self._members[-1].start()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()  # it is ready

    def train(self, number: int) -> float:
        """Let all of them train; return the seconds."""
        begin = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(number)
        for pipe in self._pipes:
            pipe.recv()
        return time.perf_counter() - begin

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        for member in self._members:
            member.kill()
            member.join()


def _serve(pipe: Connection, choice: Choice, sizes: Sizes) -> None:
    take = step(choice, sizes.batch, sizes.width)
    take()
    pipe.send(None)
    while True:
        for _ in range(pipe.recv()):
            take()
        pipe.send(None)
