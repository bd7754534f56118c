"""Atomic writes: a file is complete or absent, whenever the process is killed."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace the file at `path`, so that a reader finds either the old content or the new one, never a part.

    The caller must ensure that there is one writer at a time. Raises OSError as `open` does, also for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")  # one fixed name, so that a killed process's draft is overwritten
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)  # half a checkpoint would only fill the disk
        raise
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
