"""Checkpoints: one file for each run, replaced atomically and verified when it is loaded."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steppe.experiments.errors import ExperimentError, first_line
from steppe.experiments.storage.files import write_atomically

_FORMAT = "steppe run checkpoint, version 3"


def save(path: Path, owner: str, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) as the checkpoint of `owner`, atomically."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "owner": owner, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: Path, owner: str) -> dict[str, Any]:
    """Load a checkpoint of `save`, with its tensors on the CPU.

    Raises:
        ExperimentError: if the file is damaged, is no checkpoint of `save`, or belongs to another owner.
    """
    remedy = f"Delete {path} to train this run again from its beginning; the others are kept."
    try:
        # torch does not compare the checksums that it writes, so a flipped bit would be loaded as a weight
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # damaged archives raise many kinds of errors, in zipfile and in torch
        raise ExperimentError(
            f"the checkpoint {path} is damaged ({first_line(error)}), so the run cannot resume. {remedy}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ExperimentError(f"{path} is not a checkpoint of a run of this version. {remedy}")
    if state["owner"] != owner:
        raise ExperimentError(f"{path} belongs to another run or another configuration than this one. {remedy}")
    return state
