"""The command line: `steppe compare`, `finetune`, `tune`, `measure`, `plot`, `methods`.

Exit codes: 0 success; 1 an error, printed in one line; 2 a wrong command line; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import FrameType
from typing import Any

__all__ = ["main"]

_COMMANDS = ("compare", "tune", "measure", "plot", "methods", "finetune")
_INNER = "__tyro-dummy-inner__"  # a name inside of tyro that some of its messages have
_EXTRA = frozenset({"matplotlib", "numpy", "plotly", "rich", "tyro"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (by default those of the process) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"steppe {metadata.version('steppe')}")
        return 0
    words = _with_default(words)
    try:
        with _loading(words, ends_process=arguments is None):
            importlib.import_module("steppe.experiments.commands")
        return _run(words)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        return _fail(f"{error.name} is not installed, and experiments need it: pip install 'steppe[experiments]'")
    except KeyboardInterrupt:  # anywhere, also while libraries are imported
        return _stopped(words, 130)
    finally:
        if arguments is None:  # the process ends, and a second Ctrl-C would only interrupt its cleaning up
            with contextlib.suppress(ValueError):  # outside of the main thread
                signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _loading(words: Sequence[str], *, ends_process: bool) -> Iterator[None]:
    """Show on a terminal that libraries are loaded, which takes seconds; Ctrl-C prints one line."""

    def stop(number: int, frame: FrameType | None) -> None:
        # not by an exception, which some libraries turn into errors of their own while they are imported
        _stopped(words, 130)
        sys.stderr.flush()
        os._exit(130)

    with contextlib.ExitStack() as cleanup:
        if ends_process and threading.current_thread() is threading.main_thread():
            cleanup.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, stop))
        if sys.stderr.isatty():
            shown = "Loading PyTorch ..."
            print(shown, end="\r", file=sys.stderr, flush=True)
            cleanup.callback(print, " " * len(shown), end="\r", file=sys.stderr, flush=True)
        yield


def _with_default(words: Sequence[str]) -> list[str]:
    """Insert the default recipe.

    >>> _with_default(["compare", "--seeds", "3"])
    ['compare', 'demo', '--seeds', '3']
    """
    if words[:1] not in (["compare"], ["tune"]) or words[1:2] in (["-h"], ["--help"]):
        return list(words)
    return [words[0], "demo", *words[1:]] if not words[1:] or words[1].startswith("-") else list(words)


def _run(words: Sequence[str]) -> int:
    # imported here, so that main() can report missing libraries of the extra `experiments`
    from rich.console import Console

    from steppe.experiments.errors import ExperimentError, of_system
    from steppe.experiments.training.stopping import Stopped
    from steppe.experiments.world import is_first_process

    try:
        # emoji: a model called pkg:factory has none in its name
        _parse(words).run(["steppe", *words], Console(quiet=not is_first_process(), emoji=False))
    except Stopped as stopped:
        return _stopped(words, 128 + stopped.signal)
    except ExperimentError as error:
        return _fail(str(error))
    except OSError as error:  # a full disk, a folder without write permission: the system's message is clear
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        return _fail(of_system(error))
    return 0


def _reader_is_gone() -> bool:
    """True if nobody reads the output any more, as after `steppe compare demo --help | head`; the rest is dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report what it cannot write
    return True


def _parse(words: Sequence[str]) -> Any:
    """Return the command; SystemExit with 2 after a message that names what is wrong, and the right help."""
    if message := _typo(words):
        print(f"steppe: {message}", file=sys.stderr)
        raise SystemExit(2)
    from steppe.experiments.commands import parse

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parse(words)
    finally:  # tyro points to the help of `steppe` alone, where the options of a command are not listed
        named = [
            word for word in words[: 2 if words[:1] in (["compare"], ["tune"]) else 1] if word[:1] not in ("-", "")
        ]
        command = " ".join(["steppe", *named, "--help"])
        for line in printed.getvalue().replace(_INNER, "").splitlines():
            text = line.replace("steppe --help", command)
            print(text if text == line else f"{text.rstrip(' │').ljust(len(line) - 2)} │", file=sys.stderr)


def _typo(words: Sequence[str]) -> str | None:
    """Return the message for a command or a recipe that there is not, or None."""
    from steppe.experiments.config.presets import RECIPES
    from steppe.experiments.errors import closest

    if words and words[0] not in _COMMANDS and not words[0].startswith("-"):
        return f"there is no command {words[0]!r}{closest(words[0], _COMMANDS)} `steppe --help` lists the commands"
    if words[:1] not in (["compare"], ["tune"]) or words[1].startswith("-"):
        return None
    if words[1] in RECIPES or ":" in words[1]:  # package.module:function is a task of the user's own
        return None
    close = closest(words[1], RECIPES)
    return f"there is no recipe {words[1]!r}{close} `steppe {words[0]} --help` lists the recipes"


def _stopped(words: Sequence[str], code: int) -> int:
    processes = os.environ.get("WORLD_SIZE", "1")  # set by torchrun; an import here could be interrupted again
    start = f"torchrun --nproc-per-node {processes} -m steppe" if processes != "1" else "steppe"
    if os.environ.get("RANK", "0") == "0":
        print(f"\nStopped. To resume: {start} {shlex.join(words)}", file=sys.stderr)
    return code


def _fail(message: str) -> int:
    sys.stderr.write(f"steppe: {message}\n")  # in one piece, as the processes of torchrun write to one terminal
    return 1
