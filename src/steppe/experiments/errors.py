"""Errors that a user can fix: the command line prints one clear line and no traceback."""

import difflib
import errno
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ExperimentError(RuntimeError):
    """States the cause, the consequence and the remedy; the command line prints it and exits with 1."""


class OptionError(ExperimentError, ValueError):
    """An option that is found to be wrong only after the command line is read, as one that does not fit the task.

    In Python it is a ValueError, as every wrong option.
    """


class DataError(ExperimentError):
    """A data set is missing or damaged; the message names the file and the remedies."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message as a part of a sentence, or its type if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def reason(error: BaseException) -> str:
    """Return why reading a file failed, as a part of a sentence.

    >>> reason(KeyError("format"))
    "it has no 'format'"
    """
    return f"it has no {error}" if isinstance(error, KeyError) else first_line(error)


def of_system(error: OSError) -> str:
    """Return the system's message with the file, and the remedy for a full disk."""
    text = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += ". Make room, and give the same command again: what was finished is kept"
    return text


def unknown(field: str, value: str, known: Iterable[str]) -> str:
    """Return the message that `value` is unknown, with the closest known one.

    >>> unknown("methods", "samm", ["sgd", "sam"])
    "methods: 'samm' is unknown; did you mean 'sam'? Known: sgd, sam"
    """
    known = list(known)
    return f"{field}: {value!r} is unknown{closest(value, known)} Known: {', '.join(known) or 'none'}"


def closest(value: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of a sentence, which asks for the closest known value if one is close enough."""
    close = difflib.get_close_matches(value, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else "."


@contextmanager
def explained(what: str, happened: str, function: Any = None) -> Iterator[None]:
    """Turn an error into one line with the user's own line in it, or else the place of the user's `function`."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        whose = "the task's " if what.endswith("=") else ""
        where = place(error) or place_of(function)
        raise ExperimentError(f"{whose}{what} {happened} ({typed(error)}){where}") from error


def typed(error: BaseException) -> str:
    """Return the type and the first line of an error, of the original one if it came from a DataLoader's worker."""
    if _WORKER in str(error):  # its last line is the error itself
        return str(error).strip().splitlines()[-1]
    return f"{type(error).__name__}: {first_line(error)}"


def place(error: BaseException) -> str:
    """Return the last place of a traceback outside of installed packages; nothing if there is none."""
    found = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:  # a file that cannot be compiled is in no traceback
        text = (error.text or "").strip()
        found.append((error.filename, error.lineno, text if len(text) < _LONG else f"{text[:_LONG]}..."))
    if _WORKER in str(error):
        found += re.findall(r'File "([^"]+)", line (\d+), in .*\n +(.*)', str(error))
    for filename, number, line in reversed(found):
        if is_users(filename):
            return f", at {filename}:{number}: {line}"
    return ""


def from_task(error: BaseException) -> bool:
    """True if it was raised in what a task consists of: its functions, or the reading of its data."""
    folder = Path(__file__).parent / "tasks"
    return any(Path(f.filename).is_relative_to(folder) for f in traceback.extract_tb(error.__traceback__))


def place_of(function: Any) -> str:
    """Return where a user's function is written; nothing if it is none of theirs."""
    code = getattr(function, "__code__", None)
    if code is None or not is_users(code.co_filename):
        return ""
    return f"; it is at {code.co_filename}:{code.co_firstlineno}"


def is_users(filename: str) -> bool:
    """True for a file of the user's own: neither of Python or an installed package nor of Steppe."""
    return filename[0] != "<" and not any(Path(filename).is_relative_to(folder) for folder in _NOT_THE_USERS)


_LONG = 80  # characters
_WORKER = "Original Traceback"
"""In the message of an error in a DataLoader's worker: the rest is the traceback there."""
_NOT_THE_USERS = (
    *(Path(path) for path in map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))),
    Path(__file__).parents[1],
)
