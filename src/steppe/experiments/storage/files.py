"""Files: written atomically, so that they are complete or absent, and checked when they are read.

JSON that results depend on is written with a checksum of its content. A file without one, of an earlier version or
edited by hand, is accepted if it has the form that it must have.
"""

import glob
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from steppe.experiments.errors import ExperimentError, reason

T = TypeVar("T")

CHECKSUM = "checksum"
_STALE = 3600.0  # seconds after which the draft of a killed process is removed


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace the file at `path`, so that a reader finds either the old content or the new one, never a part.

    A link at `path` is replaced, and not what it leads to. Raises OSError with the file's name, also for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.draft")
    try:
        with draft.open("xb") as file:  # x: a new file, never one that another program has put or linked there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)  # half a checkpoint would only fill the disk
        raise OSError(error.errno, error.strerror, str(path)) from error  # write() itself names no file
    if os.name == "nt":  # where a folder cannot be opened
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write each value as a line of JSON, atomically."""
    write_atomically(path, "".join(json.dumps(value) + "\n" for value in values).encode())


def write_checked(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as indented JSON with its checksum, atomically."""
    write_json(path, {**values, CHECKSUM: checksum(json.loads(json.dumps(values)))})


def write_checked_lines(path: Path, values: Iterable[Any]) -> None:
    """Write each value as a line of JSON, and their checksum as the last line, atomically."""
    as_read = json.loads(json.dumps(list(values)))
    write_json_lines(path, [*as_read, {CHECKSUM: checksum(as_read)}])


def read_checked(path: Path, parse: Callable[[dict[str, Any]], T], remedy: str) -> T:
    """Read a JSON object by `parse`, which gets it without its checksum.

    Raises:
        ExperimentError: if the content is damaged or `parse` raises any error; in one line that ends with `remedy`.
        FileNotFoundError: if there is no file.
    """

    def read(text: str) -> T:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError(f"it holds {type(values).__name__} and not an object")
        written = values.pop(CHECKSUM, None)
        expected = checksum(values)
        parsed = parse(values)  # before the checksums are compared, because its errors say more
        if written not in (None, expected):
            raise ValueError(_CHANGED)
        return parsed

    return read_text(path, read, remedy)


def read_checked_lines(path: Path, parse: Callable[[Any], T], remedy: str) -> list[T]:
    """Read JSON lines, each by `parse`; raises as `read_checked` does."""

    def read(text: str) -> list[T]:
        lines = [json.loads(line) for line in text.splitlines()]
        is_last = bool(lines) and isinstance(lines[-1], dict) and lines[-1].keys() == {CHECKSUM}
        if is_last and lines.pop()[CHECKSUM] != checksum(lines):
            raise ValueError(_CHANGED)
        return [parse(line) for line in lines]

    return read_text(path, read, remedy)


def check_format(values: Mapping[str, Any], known: str) -> None:
    """Raise ValueError, with the way to read the file, if the format that it names is not `known`."""
    if values["format"] != known:
        raise ValueError(
            f"its format is {values['format']!r}, and this version of Steppe reads {known!r}; environment.json beside "
            "it names the version that wrote it, and that one reads it"
        )


def read_text(path: Path, read: Callable[[str], T], remedy: str) -> T:
    """Read a text file by a function; raises as `read_checked` does."""
    try:
        return read(path.read_text("utf-8"))
    except OSError as error:
        if path.exists():
            raise ExperimentError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        raise
    except Exception as error:  # of another shape, any operation on the content may fail
        raise ExperimentError(
            f"{path} is damaged, of another version or not of steppe ({reason(error)}): {remedy}"
        ) from error


_CHANGED = "it was changed since it was written; delete its entry 'checksum' if the change is meant"


def checksum(values: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return the checksum of JSON values as they are read."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _remove_stale(path: Path) -> None:
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.draft"):
        try:
            if time.time() - draft.lstat().st_mtime > _STALE:
                draft.unlink()
        except OSError:  # another process has removed it
            continue
