"""The command line: `steppe compare`, `finetune`, `tune`, `measure`, `plot`, `methods`, `recipes`, `completion`.

Exit codes: 0 success; 1 an error, printed in one line; 2 a wrong command line; 130 Ctrl-C.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import FrameType
from typing import Any

from steppe.cli import completion, grammar, help_text, recipes, typos
from steppe.cli.grammar import names_recipe, recipe_of, takes_recipe

__all__ = ["main"]

_INNER = "__tyro-dummy-inner__"  # a name inside of tyro that some of its messages have
_WIDE = 10_000
_EXTRA = frozenset({"matplotlib", "numpy", "rich", "tyro"})
_LONG = ("compare", "finetune", "tune", "measure")
_LOADING = "Loading PyTorch ..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (by default those of the process) and return the exit code.

    The version, the help, the completion, the list of recipes and typos are there at once, without PyTorch.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _let_print_everything()
    try:
        if (code := _at_once(words)) is not None:
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 1
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


def _at_once(words: Sequence[str]) -> int | None:
    """Answer what needs no PyTorch, and return the exit code; None for any other command line."""
    if words[:1] == [completion.ASK]:
        sys.stdout.writelines(f"{line}\n" for line in completion.lines(words[1:]))
        return 0
    if words in (["--version"], ["-V"]):
        print(f"steppe {metadata.version('steppe')}")
        return 0
    if (text := _help(words)) is not None:
        sys.stdout.write(text)
        return 0
    if message := typos.check(words):
        print(f"steppe: {message}", file=sys.stderr)
        return 2
    if words[0] == "completion":
        sys.stdout.write(completion.SCRIPTS[words[1]])
        return 0
    if words[0] == "recipes":
        names, as_json = [word for word in words[1:] if word != "--json"], "--json" in words
        sys.stdout.write(recipes.as_json(names) if as_json else recipes.as_text(names))
        return 0
    return None


def _help(words: Sequence[str]) -> str | None:
    """Return the help that is asked for; None if none is, or if it is of something that there is not."""
    if not {"-h", "--help"} & set(words):
        return None
    known, name = grammar.grammar(), recipe_of(words)
    if words[0] in ("-h", "--help"):
        return help_text.overview(known)
    if words[0] not in known.commands:
        return None
    command = known.commands[words[0]]
    if name is None:
        return help_text.of_command(known, command)
    return help_text.of_recipe(command, known.recipes[name]) if name in known.recipes else None


def _let_print_everything() -> None:
    """Let streams that cannot encode a character print a plain one in its place, as with PYTHONIOENCODING=ascii."""
    codecs.register_error("steppe", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="steppe")


_PLAIN = {"±": "+/-", "−": "-", "–": "-", "×": "x", "…": "...", "→": "->", "≤": "<=", "≥": ">="}


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(one, "?") for one in error.object[error.start : error.end]), error.end


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
            print(_LOADING, end="\r", file=sys.stderr, flush=True)
            cleanup.callback(print, " " * len(_LOADING), end="\r", file=sys.stderr, flush=True)
        elif ends_process and words[0] in _LONG and _is_first_process():
            print(_LOADING, file=sys.stderr, flush=True)
        yield


def _with_default(words: Sequence[str]) -> list[str]:
    """Insert the default recipe.

    >>> _with_default(["compare", "--seeds", "3"])
    ['compare', 'demo', '--seeds', '3']
    """
    if takes_recipe(words) and not names_recipe(words):
        return [words[0], grammar.grammar().default_recipe, *words[1:]]
    return list(words)


def _run(words: Sequence[str]) -> int:
    # imported here, so that main() can report missing libraries of the extra `experiments`
    from rich.console import Console

    from steppe.experiments.analysis.summary import only_finite
    from steppe.experiments.errors import ExperimentError, of_system
    from steppe.experiments.training.stopping import Stopped
    from steppe.experiments.world import is_first_process

    try:
        with _printing_to_stderr() if "--json" in words else contextlib.nullcontext():
            command = _parse(words)
            # emoji: a model called pkg:factory has none in its name
            console = Console(quiet=not is_first_process(), emoji=False, stderr=command.json)
            result = command.run(["steppe", *words], console)
        if command.json and is_first_process():
            print(json.dumps(only_finite(result), indent=2))
    except SystemExit as stop:  # a wrong command line, after a message
        return int(stop.code or 0)
    except Stopped as stopped:
        return _stopped(words, 128 + stopped.signal)
    except ExperimentError as error:
        return _fail(str(error))
    except OSError as error:  # a full disk, a folder without write permission: the system's message is clear
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        return _fail(of_system(error))
    return 0


@contextlib.contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Send to stderr what a user's code or a library prints, also in worker processes, which inherit the descriptor."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _reader_is_gone() -> bool:
    """True if nobody reads the output any more, as after `steppe compare demo --help | head`; the rest is dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report what it cannot write
    return True


def _parse(words: Sequence[str]) -> Any:
    """Return the command; SystemExit with 2 after one line that names what is wrong, and the right help."""
    from steppe.experiments.commands import parse

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), _columns(_WIDE):
            return parse(words)
    finally:
        if text := printed.getvalue():
            print(f"steppe: {_in_one_line(text, _asks_for_help(words))}", file=sys.stderr)


def _asks_for_help(words: Sequence[str]) -> str:
    """Return the command that explains the options of a command line."""
    named = [word for word in words[: 2 if takes_recipe(words) else 1] if word[:1] not in ("-", "")]
    return " ".join(["steppe", *named, "--help"])


def _in_one_line(text: str, command: str) -> str:
    """Return the first part of what tyro says, which is framed, and the command that explains the options.

    >>> _in_one_line("╭─ Value error ─╮\\n│ Error parsing --lr: odd. │\\n│ ───── │\\n│ More │", "steppe tune --help")
    '--lr: odd. `steppe tune --help` explains the options'
    """
    lines = [line.strip("│ ") for line in text.replace(_INNER, "").splitlines()[1:]]  # without the heading
    if lines and _is_rule(lines[0]):  # below the heading, where the output can be ASCII only
        lines = lines[1:]
    first = itertools.takewhile(lambda line: not _is_rule(line), lines)
    said = " ".join(" ".join(first).split()).removeprefix("Error parsing ").removesuffix(" (required)")
    # what a class, a field of it or a section is called, and the option's name if it is there twice
    said = re.sub(r"^(--methods: )?(recipe|[A-Z][a-z]+|(\.[a-z_]+)+|methods|--methods [^ ]+): ", r"\1", said)
    return f"{said.rstrip('.')}. `{command}` explains the options"


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-╰╯")


@contextlib.contextmanager
def _columns(number: int) -> Iterator[None]:
    """Let text be wrapped at so many columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(number)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _is_first_process() -> bool:
    """True in the process of torchrun that prints for all; as steppe.experiments.world has it, without PyTorch."""
    return os.environ.get("RANK", "0") == "0"


def _stopped(words: Sequence[str], code: int) -> int:
    processes = os.environ.get("WORLD_SIZE", "1")  # set by torchrun; an import here could be interrupted again
    start = f"torchrun --nproc-per-node {processes} -m steppe" if processes != "1" else "steppe"
    if _is_first_process():
        print(f"\nStopped. To resume: {start} {shlex.join(words)}", file=sys.stderr)
    return code


def _fail(message: str) -> int:
    sys.stderr.write(f"steppe: {message}\n")  # in one piece, as the processes of torchrun write to one terminal
    return 1
