"""Time training steps and evaluations in one process, with all combinations of threads, layout, precision, compiler."""

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
    """The sizes that are measured."""

    batch: int = 64
    width: int = 16
    widths: tuple[int, ...] = (8, 32)
    """Further widths."""
    images: int = 1000
    chunks: tuple[int, ...] = (100, 250, 500, 1000)
    rounds: int = 7
    repeat: int = 3


@dataclass(frozen=True)
class Configuration:
    """Threads, memory layout, precision and compilation of a network."""

    threads: int
    channels_last: bool = False
    bf16: bool = False
    compile: bool = False

    def problem(self, batch: int, width: int) -> Problem:
        """Return the network and the images in this configuration."""
        return Problem(batch, width, 2, channels_last=self.channels_last, amp=self.bf16, compile=self.compile)

    def safe(self, width: int) -> bool:
        """Return True if torch does not write out of bounds (see `steppe.experiments.world.resolve`)."""
        return not (self.channels_last and self.threads > 1 and width % 16)


def training_step(configuration: Configuration, batch: int, width: int) -> Callable[[], None]:
    """Return a function that takes one step of SGD, as in training."""
    problem = configuration.problem(batch, width)
    network, (images, labels) = problem.network(), problem.data()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def take() -> None:
        torch.set_num_threads(configuration.threads)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return take


def evaluation(configuration: Configuration, images: int, chunk: int, width: int) -> Callable[[], None]:
    """Return a function that makes one forward over the images, in evaluation mode."""
    problem = configuration.problem(images, width)
    network, (all_images, _) = problem.network().eval(), problem.data()

    def take() -> None:
        torch.set_num_threads(configuration.threads)
        with torch.no_grad():
            for part in torch.split(all_images, chunk):
                network(part)

    return take


def measure_steps(sizes: Sizes, cores: int, *, compiled: bool) -> list[Row]:
    """Return the rows of the demo's width, then of the others."""
    torch._dynamo.config.recompile_limit = 64  # all configurations share the same code
    rows: list[Row] = []
    for width in (sizes.width, *sizes.widths):
        safe = [c for c in configurations(cores, compiled=compiled and width == sizes.width) if c.safe(width)]
        steps = {configuration: training_step(configuration, sizes.batch, width) for configuration in safe}
        first = {configuration: seconds(step) for configuration, step in steps.items()}
        rows += [
            {"width": width, "first_step": first[configuration]} | row
            for configuration, row in _timed(steps, sizes, sizes.repeat, Configuration(cores)).items()
        ]
    return rows


def measure_evaluations(sizes: Sizes, cores: int) -> list[Row]:
    """Return the rows of all configurations for each size of the chunks."""
    rows: list[Row] = []
    for chunk in sizes.chunks:
        safe = [c for c in configurations(cores) if c.safe(sizes.width)]
        evaluations = {c: evaluation(c, sizes.images, chunk, sizes.width) for c in safe}
        timed = _timed(evaluations, sizes, 1, Configuration(cores))
        rows += [{"chunk": chunk, "images": sizes.images} | row for row in timed.values()]
    return rows


def configurations(cores: int, *, compiled: bool = False) -> Iterator[Configuration]:
    """Yield all combinations, the plain ones first."""
    threads = sorted({1, min(2, cores), cores}, reverse=True)
    for number, bf16, channels_last in itertools.product(threads, (False, True), (False, True)):
        yield (configuration := Configuration(number, channels_last, bf16))
        if compiled:
            yield replace(configuration, compile=True)


def _timed(
    functions: dict[Configuration, Callable[[], None]], sizes: Sizes, repeat: int, reference: Configuration
) -> dict[Configuration, Row]:
    """Time all in turns; ratios are to the time of the reference."""
    threads = torch.get_num_threads()
    times = in_turns({str(c): function for c, function in functions.items()}, sizes.rounds, repeat=repeat)
    torch.set_num_threads(threads)
    return {c: asdict(c) | spread(times[str(c)], times[str(reference)]) for c in functions}
