"""Errors that a user can fix: the command line prints one clear line and no traceback."""

import difflib
import errno
from collections.abc import Iterable


class ExperimentError(RuntimeError):
    """States the cause, the consequence and the remedy; the command line prints it and exits with 1."""


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
