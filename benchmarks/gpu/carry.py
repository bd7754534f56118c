"""What a machine that keeps nothing must hand on: a folder of few and small files, verified when they come back.

`results.tar.gz` has the results of this device, `state.tar.0`, `state.tar.1`, ... what is in progress, in pieces, and
`manifest.json` the SHA-256 of each.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.files import write_atomically, write_json

PIECE = 16 << 20
FILES, TOTAL = 8, 60 << 20

_FORMAT = "steppe benchmarks/gpu, version 1"
_MANIFEST, _RESULTS, _STATE, _SERIAL = "manifest.json", "results.tar.gz", "state.tar", "serial"
_SLACK = 2048  # of a tar: a header and the padding of each file


def serial(state: Path) -> int:
    """How many calls have added to this state; 0 where there is none."""
    path = state / _SERIAL
    return int(path.read_text()) if path.exists() else 0


def count(state: Path) -> None:
    """Count a call."""
    write_atomically(state / _SERIAL, str(serial(state) + 1).encode())


def collect(
    state: Path, results: Path, folder: Path, order: list[str], *, piece: int = PIECE, total: int = TOTAL
) -> list[str]:
    """Write the results of a device and the state into `folder`; return what there was no room for.

    `order` names the parts of the state (its folders), the most valuable first.
    """
    packed = _pack((path, path.relative_to(results.parent)) for path in _files(results))
    room = min(total, (FILES - 2) * piece) - len(packed) - (64 << 10)  # the manifest, and the end of the tar
    taken, left = [], []
    for path in sorted(_files(state), key=lambda path: _rank(path.relative_to(state), order, path.stat().st_size)):
        size = path.stat().st_size + _SLACK
        if size <= room:
            taken.append(path)
            room -= size
        else:
            left.append(f"{path.relative_to(state)} ({size / 2**20:.0f} MiB)")
    whole = _pack(((path, path.relative_to(state)) for path in taken), mode="w")
    parts = {f"{_STATE}.{n}": whole[i : i + piece] for n, i in enumerate(range(0, len(whole), piece))}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{_STATE}.*"):
        old.unlink()
    for name, content in {_RESULTS: packed, **parts}.items():
        write_atomically(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in {_RESULTS: packed, **parts}.items()}
    write_json(folder / _MANIFEST, {"format": _FORMAT, "serial": serial(state), "files": digests, "left_out": left})
    return left


def bring_back(folder: Path, state: Path, results: Path) -> bool:
    """Put `state` and the results together again; False where those here are as new.

    Raises ExperimentError for a folder that is none, and for a file of it that is missing or damaged: nothing is
    written then.
    """
    manifest, contents = _verified(folder)
    if serial(state) >= manifest["serial"]:
        return False
    if state.exists():
        shutil.rmtree(state)
    _unpack(b"".join(contents[name] for name in manifest["files"] if name != _RESULTS), state)
    _unpack(contents[_RESULTS], results)
    return True


def _verified(folder: Path) -> tuple[dict, dict[str, bytes]]:
    way_out = f"Bring {folder} back as --out wrote it, or leave --from out and begin anew."
    path = folder / _MANIFEST
    if not path.is_file():
        raise ExperimentError(f"{folder} has no {_MANIFEST}, so it is not what --out wrote. {way_out}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        files, _ = dict(manifest["files"]), int(manifest["serial"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path} is damaged or of another version ({error}). {way_out}") from error
    contents = {}
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise ExperimentError(f"{folder / name} is missing. {way_out}")
        contents[name] = (folder / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise ExperimentError(f"{folder / name} is damaged: its SHA-256 is not that of {_MANIFEST}. {way_out}")
    return manifest, contents


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".draft"))


def _rank(path: Path, order: list[str], size: int) -> tuple[bool, int, str]:
    """What is small goes first, then the checkpoints in the list's order."""
    part = order.index(path.parts[0]) if path.parts[0] in order else len(order)
    return size > 1 << 20, part, str(path)


def _pack(files: Iterator[tuple[Path, Path]], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for path, name in files:
            archive.add(path, str(name))
    return buffer.getvalue()


def _unpack(content: bytes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11 has it from 3.11.4 on
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
