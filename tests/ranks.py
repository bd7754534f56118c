"""Processes with one gloo process group on this machine, kept for many tests, all of which run in one worker.

They are forked from a server that has imported what takes seconds: so it is imported once for all of them.
"""

import atexit
import contextlib
import datetime
import functools
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_TIMEOUT = datetime.timedelta(seconds=60)
_IMPORTED_ONCE = (
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "steppe",
    "accelerate",
    "peft",
    "transformers.trainer",
)
"""Heavy modules that the processes need; those of them that the tests of this run have imported are imported once."""


class RankError(AssertionError):
    """An exception in one of the processes, with its traceback."""


class Ranks:
    """``size`` processes with one process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([name for name in _IMPORTED_ONCE if name in sys.modules])
        store = tempfile.mktemp(prefix="steppe-ranks-")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(*args)`` in every process and return the results by rank."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self._pipes]
        failures = [f"rank {rank}:\n{trace}" for rank, (trace, _, _) in enumerate(answers) if trace]
        if failures:
            self.close()
            start_ranks.cache_clear()
            raise RankError("\n".join(failures))
        if reason := next((reason for _, reason, _ in answers if reason), None):
            pytest.skip(reason)
        return [result for _, _, result in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()


@functools.cache
def start_ranks(size: int = 2) -> Ranks:
    """Start the processes at the first call, and return the same ones at later calls."""
    ranks = Ranks(size)
    atexit.register(ranks.close)
    return ranks


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    # torch 2.6, when tensors are distributed over a CPU mesh; no test draws random numbers there
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
    # likewise, from inside its distributed checkpoints
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=size, timeout=_TIMEOUT)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((None, None, function(*args)))
        except pytest.skip.Exception as skipped:
            pipe.send((None, str(skipped), None))
        except BaseException:
            pipe.send((traceback.format_exc(), None, None))
    dist.destroy_process_group()
