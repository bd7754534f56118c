"""The inputs of a user: files of weights, and data."""

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from steppe.experiments.entry_points import one_line_errors
from steppe.experiments.errors import ExperimentError
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.flatness._batches import Batches, list_tensors, split_rows

_KEYS = ("state_dict", "model_state_dict", "model")
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
_FEW = 3  # names in an error
_FORMS = "a tuple of tensors (inputs, targets), a Dataset of such pairs, or batches: a DataLoader, a list"


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
    with one_line_errors(f"{path} cannot be loaded into {type(network).__name__}: "):
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


def prepare_data(given: Any, name: str, options: MeasuringOptions, *, pairs: bool) -> Any:
    """Convert the user's data to the form that :class:`steppe.flatness.Objective` takes.

    From tensors and datasets, `options.samples` are drawn, or all if there are fewer; from a dataset only once, so that
    augmentation does not change them from pass to pass. Batches are used as they are. `name` is that of the data in
    errors; with `pairs`, an item must be (inputs, targets).
    """
    if isinstance(given, tuple) and len(given) > 1 and all(isinstance(t, Tensor) and t.dim() for t in given):
        if len({len(t) for t in given}) > 1:
            lengths = " and ".join(str(len(t)) for t in given)
            raise ExperimentError(f"--data {name} gives tensors of {lengths} entries, and each input needs its target")
        drawn = _drawn(len(given[0]), options)
        return tuple(t[drawn.to(t.device)] for t in given)
    if isinstance(given, IterableDataset):
        raise ExperimentError(f"--data {name} gives samples one after the other: put a DataLoader around the dataset")
    if isinstance(given, Iterator):
        raise ExperimentError(
            f"--data {name} gives {type(given).__name__}, which can be iterated over only once, and a measure needs "
            f"many passes: give {_FORMS}"
        )
    indexable = hasattr(given, "__getitem__") and not isinstance(given, list)
    if not hasattr(given, "__len__" if indexable else "__iter__") or isinstance(given, tuple | Tensor | Mapping | str):
        raise ExperimentError(f"--data {name} gives {_describe(given)}: give {_FORMS}")
    return _collated(given, name, _drawn(len(given), options), options.batch_size, pairs=pairs) if indexable else given


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file; ExperimentError when there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror or error}") from error


def digest_of_model(network: nn.Module) -> str:
    """Return the SHA-256 of a network's tensors and their names."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + (_content(value) if isinstance(value, Tensor) else b""))
    return digest.hexdigest()


def digest_of_data(data: Any) -> str:
    """Return the sum of the samples' SHA-256, which does not depend on their order and batches."""
    total = 0
    for batch, _ in Batches(data, 1):
        for sample in split_rows(batch, 1):
            content = b"".join(map(_content, list_tensors(sample)))
            total += int.from_bytes(hashlib.sha256(content).digest(), "big")
    return f"{total % 2**256:064x}"


def _content(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(path: Path) -> Any:
    with one_line_errors(
        f"{path} is damaged, or no file of weights (", ")"
    ):  # damaged files raise many kinds of errors
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file  # it comes with transformers

                return load_file(path)
            if zipfile.is_zipfile(path):  # torch does not compare the checksums that it writes
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
                if damaged is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            return torch.load(path, map_location="cpu", weights_only=True)
        except ModuleNotFoundError as error:
            raise ExperimentError(
                f"{path} is read by the package safetensors, which is not installed: pip install safetensors"
            ) from error
        except Exception as error:
            if "weights_only" not in str(error):
                raise
            raise ExperimentError(
                f"{path} holds more than tensors and plain values, and would run code when it is read: save the state "
                "dict alone, torch.save(model.state_dict(), path)"
            ) from error


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


def _drawn(n: int, options: MeasuringOptions) -> Tensor:
    generator = torch.Generator().manual_seed(options.budget.seed)
    return torch.randperm(n, generator=generator)[: options.samples].sort().values


def _collated(dataset: Any, name: str, drawn: Tensor, batch_size: int, *, pairs: bool) -> list[Any]:
    with one_line_errors(f"--data {name}: an item of it cannot be read: "):
        items = [dataset[i] for i in drawn.tolist()]
    other = next((item for item in items if not isinstance(item, tuple | list) or len(item) < 2), None)
    if pairs and other is not None:
        raise ExperimentError(
            f"--data {name}: an item is {_describe(other)}, and a loss takes (inputs, targets): give with --evaluate "
            "the loss of a batch, package.module:function, (model, batch) -> mean loss"
        )
    remedy = "): give a DataLoader with a collate_fn of its own"
    with one_line_errors(f"--data {name}: its items cannot be put into one batch (", remedy):
        return [default_collate(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]


def _describe(thing: Any) -> str:
    """Return the type of an object, with its size."""
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)} ({', '.join(type(x).__name__ for x in thing[:3])})"
    return f"a tensor of shape {tuple(thing.shape)}" if isinstance(thing, Tensor) else type(thing).__name__
