"""The file of a checkpoint: sealed when it is written, verified when it is read."""

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from steppe.experiments.errors import ExperimentError, reason
from steppe.experiments.storage.files import write_atomically

_FORMAT = "steppe run checkpoint, version 3"


def save(path: Path, owner: str, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) as the checkpoint of `owner`, atomically."""
    buffer = io.BytesIO()
    torch.save({**state, "format": _FORMAT, "owner": owner, "sealed": True}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = _seal(archive)
    write_atomically(path, buffer.getbuffer())


def load(path: Path, owner: str) -> dict[str, Any]:
    """Load a checkpoint of `save`, with its tensors on the CPU.

    Raises:
        ExperimentError: if the file is damaged, is no checkpoint of `save`, or belongs to another owner.
    """
    with one_line_errors(path):
        # torch does not compare the checksums that it writes, so a flipped bit would be loaded as a weight
        with zipfile.ZipFile(path) as archive:
            damaged, is_sealed = archive.testzip(), archive.comment == _seal(archive)
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ExperimentError(f"{path} is not a checkpoint of a run of this version. {_remedy(path)}")
    if state.get("sealed") and not is_sealed:  # one of an earlier version has no seal
        raise ExperimentError(
            f"the checkpoint {path} was changed by another program, so the run cannot resume. {_remedy(path)}"
        )
    if state.get("owner") != owner:
        raise foreign(path)
    return state


def load_records(path: Path) -> tuple[list[Any], str] | None:
    """Load the records and the owner of a checkpoint without reading its tensors; None if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            is_sealed = archive.comment == _seal(archive)
            with archive.open(_pickle_of(archive)) as file:
                while file.read(2**20):  # reading to the end compares the checksum
                    pass
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        records, owner = state["records"], str(state["owner"])
    except Exception:  # damaged archives raise many kinds of errors, in zipfile and in torch
        return None
    return (records, owner) if isinstance(records, list) and is_sealed and state["format"] == _FORMAT else None


def foreign(path: Path) -> ExperimentError:
    """Return the error for a checkpoint of another owner."""
    return ExperimentError(f"{path} belongs to another run or another configuration than this one. {_remedy(path)}")


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn any error from the content of a checkpoint into an ExperimentError of one line."""
    try:
        yield
    except (ExperimentError, PermissionError):
        raise
    except Exception as error:  # damaged archives raise many kinds of errors, in zipfile and in torch
        raise ExperimentError(
            f"the checkpoint {path} is damaged ({reason(error)}), so the run cannot resume. {_remedy(path)}"
        ) from error


def _remedy(path: Path) -> str:
    return f"Delete {path} to train this run again from its beginning; the others are kept."


def _seal(archive: zipfile.ZipFile) -> bytes:
    """Return the digest of the checksums of all entries: a file that another program writes has none."""
    entries = sorted((entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist())
    return hashlib.sha256(repr(entries).encode()).hexdigest().encode()


def _pickle_of(archive: zipfile.ZipFile) -> str:
    """Return the name of the entry that holds everything but the content of the tensors."""
    return next(name for name in archive.namelist() if name.endswith("/data.pkl"))
