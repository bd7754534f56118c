"""Files of weights from training scripts: a state dict, alone or among other entries."""

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe.experiments.errors import ExperimentError
from steppe.experiments.measuring.entry_points import one_line, one_line_errors

_KEYS = ("state_dict", "model_state_dict", "model")
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
_FEW = 3  # names in an error


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a file into a network; ExperimentError when it is damaged or does not match completely."""
    state = _state_dict(_read(path), path)
    expected = network.state_dict()
    if state.keys() != expected.keys():
        state = {_PREFIXES.sub("", name): tensor for name, tensor in state.items()}
    shapes = {k: (t.shape, expected[k].shape) for k, t in state.items() if k in expected and isinstance(t, Tensor)}
    wrong = [f"{k} is {tuple(theirs)} and {tuple(ours)} here" for k, (theirs, ours) in shapes.items() if theirs != ours]
    if wrong:
        raise ExperimentError(f"{path} has other shapes than {type(network).__name__}: {_some(wrong, '; ')}")
    with one_line_errors(f"{path} cannot be loaded into {type(network).__name__}:"):
        missing, unexpected = network.load_state_dict(state, strict=False)
    # of tied tensors, a file may hold one only
    loaded = {expected[k].data_ptr() for k in state.keys() & expected.keys() if isinstance(expected[k], Tensor)}
    missing = [k for k in missing if expected[k].data_ptr() not in loaded]
    if missing or unexpected:
        differences = ((missing, "without"), (unexpected, "with an unexpected"))
        raise ExperimentError(
            f"{path} is not of this {type(network).__name__}: it comes "
            f"{' and '.join(f'{word} {_some(names)}' for names, word in differences if names)}. Weights that "
            "are not loaded would be random: name the factory of the network that was trained"
        )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file; ExperimentError when there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror or error}") from error


def digest_of_model(network: nn.Module) -> str:
    """Return the SHA-256 of a network's tensors and their names."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        if isinstance(tensor, Tensor) and tensor.numel():
            found.update(content_of(tensor))
    return found.hexdigest()


def content_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file  # it comes with transformers
            except ModuleNotFoundError as error:
                raise ExperimentError(
                    f"{path} is read by the package safetensors, which is not installed: pip install safetensors"
                ) from error
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch does not compare the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (ExperimentError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged files raise many kinds of errors
        if "weights_only" in str(error):
            raise ExperimentError(
                f"{path} holds more than tensors and plain values, and would run code when it is read: save the state "
                "dict alone, torch.save(model.state_dict(), path)"
            ) from error
        raise ExperimentError(f"{path} is damaged, or no file of weights ({one_line(error)})") from error


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    """Return the state dict of a file: the whole content, or the entry under one of the usual names."""
    if isinstance(content, Mapping):
        inner = [content[key] for key in _KEYS if isinstance(content.get(key), Mapping)]
        found = inner[0] if inner else content
        if any(isinstance(value, Tensor) for value in found.values()):
            return dict(found)
    holds = f"with {_some(list(map(str, content)))}" if isinstance(content, Mapping) else "not a dictionary"
    raise ExperimentError(
        f"{path} holds {type(content).__name__}, {holds}, and no state dict, which must be the whole content "
        f"or an entry under one of {', '.join(_KEYS)}"
    )


def _some(names: list[str], between: str = ", ") -> str:
    more = len(names) - _FEW
    return between.join(names[:_FEW]) + (f" and {more} more" if more > 0 else "")
