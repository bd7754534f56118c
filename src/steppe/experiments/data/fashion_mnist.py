"""Read, verify and download the four files of Fashion-MNIST.

The SHA-256 of each file's unpacked content is known, so a damaged, truncated or wrong file is never used.
"""

import gzip
import hashlib
import io
import logging
import math
import os
import struct
import tempfile
import time
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray

from steppe.experiments.errors import DataError

URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
TIMEOUT = 30.0  # seconds in which not one byte arrives
MAX_BYTES, MAX_SECONDS = 60_000_000, 900.0
"""Limits of a download: the largest of the files has 26 MB packed."""
WAYS_OUT = (
    "Ways out: `apt install dataset-fashion-mnist` (`apt reinstall` when the package is damaged), "
    "or name a directory that holds the four good files, with --data-dir (data_dir=) or $STEPPE_DATA."
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IdxFile:
    """One file of the dataset: its unpacked name, its array's shape, the SHA-256 of its unpacked content."""

    name: str
    shape: tuple[int, ...]
    sha256: str


# The authors publish MD5 sums of their gzipped files; these are SHA-256 sums of their content.
TRAIN = (
    IdxFile(
        "train-images-idx3-ubyte", (60_000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    IdxFile("train-labels-idx1-ubyte", (60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
)
TEST = (
    IdxFile(
        "t10k-images-idx3-ubyte", (10_000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    IdxFile("t10k-labels-idx1-ubyte", (10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
)


def from_directory(directory: Path, file: IdxFile) -> NDArray[np.uint8]:
    """Read `file`, gzipped or unpacked, from a directory; nothing in it is changed.

    Raises DataError when the file is missing, unreadable or damaged.
    """
    found = _find(directory, file)
    if found is None:
        raise DataError(
            f"{directory} is not a directory that holds {file.name} or {file.name}.gz: "
            f"Fashion-MNIST is four files, and all four are needed. {WAYS_OUT}"
        )
    path, packed = found
    try:
        return unpack(packed, file)
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: {error}. It was not used, because results from it would be wrong. "
            f"Delete it and put the good file in its place. {WAYS_OUT}"
        ) from error


def from_cache(directory: Path, file: IdxFile) -> NDArray[np.uint8]:
    """Read `file` from the cache; a missing or damaged file is downloaded again.

    Raises DataError when the download or the cache fails. Any number of processes may call this at once: each verifies
    the bytes that it returns, and a file appears whole or not at all.
    """
    while (found := _find(directory, file)) is not None:
        path, packed = found
        try:
            return unpack(packed, file)
        except ValueError as error:
            log.warning("%s is damaged (%s): it is removed and downloaded again", path, error)
            try:
                path.unlink(missing_ok=True)
            except OSError as failure:
                raise DataError(
                    f"{path} is damaged and cannot be removed ({_reason(failure)}). Delete it yourself. {WAYS_OUT}"
                ) from failure
    return _download(file, directory)


def unpack(packed: bytes, file: IdxFile) -> NDArray[np.uint8]:
    """Unpack and verify one file's bytes, gzipped or not.

    Returns a read-only uint8 array of `file.shape`. Raises ValueError with the reason when they are not the file.
    """
    try:
        content = _decompressed(packed, file) if packed.startswith(b"\x1f\x8b") else packed
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"it does not unpack ({error})") from error
    array = parse_idx(content)
    if array.shape != file.shape:
        raise ValueError(f"it is another IDX file, of shape {array.shape} and not {file.shape}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise ValueError(f"the SHA-256 of its content is {digest} and not {file.sha256}")
    return array


def _decompressed(packed: bytes, file: IdxFile) -> bytes:
    """Unpack gzip, but not more than the file can be: a few kilobytes may unpack to gigabytes."""
    limit = 2 * math.prod(file.shape) + 2**20
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        content = stream.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"it unpacks to more than {limit} bytes, and the file has {limit // 2} at most")
        return content


def parse_idx(content: bytes) -> NDArray[np.uint8]:
    """Parse an IDX file of unsigned bytes: two zeros, type 8, the rank, big-endian sizes, then the values.

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    array([7, 8, 9], dtype=uint8)
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"it is not IDX: it begins with {content[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError("it ends within its header")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    size = start + math.prod(shape)
    if len(content) != size:
        raise ValueError(f"its shape {shape} needs {size} bytes, and it holds {len(content)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(directory: Path, file: IdxFile) -> tuple[Path, bytes] | None:
    # no test for existence before opening: another process may repair the cache in between
    for path in (directory / file.name, directory / f"{file.name}.gz"):
        try:
            return path, path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({_reason(error)}). Make it readable, or delete it. {WAYS_OUT}"
            ) from error
    return None


def _download(file: IdxFile, directory: Path) -> NDArray[np.uint8]:
    url, path = f"{URL}{file.name}.gz", directory / f"{file.name}.gz"
    log.info("downloading %s to %s", url, path)
    try:
        packed = _fetch(url)
        array = unpack(packed, file)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # an open one would keep the connection for as long as the exception lives
        raise DataError(
            f"{file.name} is not on this machine, and downloading it from {url} failed ({_reason(error)}). "
            f"Try again when the network is up. {WAYS_OUT}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{file.name} is not on this machine, and the download from {url} is not this file: {error}. "
            f"It was discarded. Try again later. {WAYS_OUT}"
        ) from error
    try:
        _store(packed, path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({_reason(error)}). Nothing was left there. "
            f"Make room or make it writable, or name another cache with $XDG_CACHE_HOME. {WAYS_OUT}"
        ) from error
    return array


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to a scheme that anyone on the way can read and change."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            fp.close()
            raise OSError(f"it is redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str) -> bytes:
    """Download a file; OSError when it is larger than any of these or takes too long."""
    begun, content = time.monotonic(), bytearray()
    opener = urllib.request.build_opener(_SecureRedirects)
    with opener.open(url, timeout=TIMEOUT) as response:
        while part := response.read1(2**16):
            content += part
            if len(content) > MAX_BYTES:
                raise OSError(f"it is larger than {MAX_BYTES // 10**6} MB")
            if time.monotonic() - begun > MAX_SECONDS:
                raise OSError(f"it takes more than {MAX_SECONDS:.0f} seconds")
        if response.length:
            raise IncompleteRead(bytes(content), response.length)
    return bytes(content)


def _store(content: bytes, path: Path) -> None:
    """Write a file so that it appears whole or not at all, even if the process dies in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    # str(OSError) repeats the path, which every message here names already
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
