"""One process: a training step and an evaluation, in every combination of threads, layout, precision and compiling."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from epoch.methods import Problem

from timing import in_turns, seconds, spread

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    batch: int = 64
    width: int = 16
    widths: tuple[int, ...] = (8, 32)
    """Further widths."""
    images: int = 1000
    chunks: tuple[int, ...] = (100, 250, 500, 1000)
    rounds: int = 7
    repeat: int = 3


@dataclass(frozen=True)
class Choice:
    """How something is computed."""

    threads: int
    channels_last: bool = False
    bf16: bool = False
    compile: bool = False

    def problem(self, batch: int, width: int) -> Problem:
        """The network and the images that are computed so."""
        return Problem(batch, width, 2, channels_last=self.channels_last, amp=self.bf16, compile=self.compile)

    def safe(self, width: int) -> bool:
        """Whether torch stays within its memory (see `steppe.experiments.world.resolve`)."""
        return not (self.channels_last and self.threads > 1 and width % 16)


def step(choice: Choice, batch: int, width: int) -> Callable[[], None]:
    """One of SGD, as training makes it."""
    problem = choice.problem(batch, width)
    network, (images, labels) = problem.network(), problem.data()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def take() -> None:
        torch.set_num_threads(choice.threads)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return take


def evaluation(choice: Choice, images: int, chunk: int, width: int) -> Callable[[], None]:
    """A pass over the images, in evaluation mode."""
    problem = choice.problem(images, width)
    network, (all_images, _) = problem.network().eval(), problem.data()

    def take() -> None:
        torch.set_num_threads(choice.threads)
        with torch.no_grad():
            for part in torch.split(all_images, chunk):
                network(part)

    return take


def steps(sizes: Sizes, cores: int, *, compiled: bool) -> list[Row]:
    """Rows of the demo's width, then of the others."""
    torch._dynamo.config.recompile_limit = 64  # all choices share one piece of code
    rows: list[Row] = []
    for width in (sizes.width, *sizes.widths):
        chosen = [c for c in choices(cores, compiled=compiled and width == sizes.width) if c.safe(width)]
        made = {choice: step(choice, sizes.batch, width) for choice in chosen}
        first = {choice: seconds(take) for choice, take in made.items()}
        rows += [
            {"width": width, "first": first[choice]} | row
            for choice, row in timed(made, sizes, sizes.repeat, Choice(cores)).items()
        ]
    return rows


def evaluations(sizes: Sizes, cores: int) -> list[Row]:
    """Rows of each choice, at each size of the chunks."""
    rows: list[Row] = []
    for chunk in sizes.chunks:
        made = {c: evaluation(c, sizes.images, chunk, sizes.width) for c in choices(cores) if c.safe(sizes.width)}
        rows += [
            {"chunk": chunk, "images": sizes.images} | row for row in timed(made, sizes, 1, Choice(cores)).values()
        ]
    return rows


def timed(made: dict[Choice, Callable[[], None]], sizes: Sizes, repeat: int, beside: Choice) -> dict[Choice, Row]:
    """Each in turns; ratios are to the time of one of them."""
    before = torch.get_num_threads()
    by_name = {str(choice): take for choice, take in made.items()}
    times = in_turns(by_name, sizes.rounds, repeat=repeat)
    torch.set_num_threads(before)
    return {choice: asdict(choice) | spread(times[str(choice)], times[str(beside)]) for choice in made}


def choices(cores: int, *, compiled: bool = False) -> Iterator[Choice]:
    """All combinations, the plain ones first."""
    threads = sorted({1, min(2, cores), cores}, reverse=True)
    for number, bf16, channels_last in itertools.product(threads, (False, True), (False, True)):
        yield (choice := Choice(number, channels_last, bf16))
        if compiled:
            yield replace(choice, compile=True)
