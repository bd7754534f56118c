"""Fashion-MNIST is read from the right place and verified, and every failure is one clear DataError.

The tests use four IDX files of a few images with checksums of their own, so that every failure really happens. Those
marked full_data check the true set.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mutations import mutate

from steppe.experiments.data import datasets as data
from steppe.experiments.data import fashion_mnist
from steppe.experiments.data.datasets import load
from steppe.experiments.data.fashion_mnist import IdxFile, parse_idx, unpack
from steppe.experiments.errors import DataError

CLOSED_PORT = "http://127.0.0.1:9/"


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx_bytes(array: np.ndarray) -> bytes:
    """Write the format by its own description, apart from the reader under test."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def stand_in(name: str, shape: tuple[int, ...], seed: int) -> tuple[IdxFile, bytes]:
    content = idx_bytes(np.random.default_rng(seed).integers(0, 10, shape, dtype=np.uint8))
    return IdxFile(name, shape, hashlib.sha256(content).hexdigest()), content


@dataclass
class Tiny:
    """The stand-in set, and the three directories in which `load` may look without being told."""

    root: Path
    files: dict[str, tuple[IdxFile, bytes]]

    @property
    def cache(self) -> Path:
        return self.root / "xdg" / "steppe" / "fashion-mnist"

    @property
    def system(self) -> Path:
        return self.root / "system"

    def write(self, directory: Path, *, zipped: bool = True) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (_, content) in self.files.items():
            path = directory / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
        return directory

    def cached(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.cache.iterdir()} if self.cache.exists() else {}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    shapes = {
        IMAGES: (20, 28, 28),
        LABELS: (20,),
        "t10k-images-idx3-ubyte": (10, 28, 28),
        "t10k-labels-idx1-ubyte": (10,),
    }
    files = {name: stand_in(name, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    facts = [file for file, _ in files.values()]
    made = Tiny(tmp_path, files)
    monkeypatch.setattr(fashion_mnist, "TRAIN", tuple(facts[:2]))
    monkeypatch.setattr(fashion_mnist, "TEST", tuple(facts[2:]))
    monkeypatch.setattr(fashion_mnist, "URL", CLOSED_PORT)
    monkeypatch.setattr(data, "SYSTEM", made.system)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("STEPPE_DATA", raising=False)
    return made


@dataclass
class Server:
    """A web server on this machine that holds the stand-in set and can misbehave about one file."""

    files: dict[str, bytes]
    status: dict[str, int] = field(default_factory=dict)
    cut_after: dict[str, int] = field(default_factory=dict)
    stall: dict[str, float] = field(default_factory=dict)
    announce_length: bool = True
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server({f"{name}.gz": gzip.compress(content) for name, (_, content) in tiny.files.items()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            state.asked.append(name)
            body = state.files[name]
            self.send_response(state.status.get(name, 200))
            if state.announce_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.cut_after.get(name, len(body))])
            self.wfile.flush()
            time.sleep(state.stall.get(name, 0.0))

        def log_message(self, *_: Any) -> None:
            pass

    event_reader = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=event_reader.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{event_reader.server_port}/")
    yield state
    event_reader.shutdown()
    thread.join()
    event_reader.server_close()


def assert_is_the_stand_in(loaded: data.Dataset, tiny: Tiny) -> None:
    values = [np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]) for _, content in tiny.files.values()]
    tensors = [loaded.train.images, loaded.train.labels, loaded.test.images, loaded.test.labels]
    for tensor, expected in zip(tensors, values, strict=True):
        assert np.array_equal(tensor.numpy().ravel(), expected)


def refusal(name: str, data_dir: Path | None = None) -> str:
    """Load, expect the one error, check that it names the file and every way out, and return its text."""
    with pytest.raises(DataError) as caught:
        load("fashion-mnist", data_dir)
    message = str(caught.value)
    for part in (name, "apt install dataset-fashion-mnist", "--data-dir", "$STEPPE_DATA"):
        assert part in message
    return message


def cut_short(good: bytes) -> bytes:
    return good[: len(good) // 2]


def flipped(good: bytes) -> bytes:
    middle = len(good) // 2
    return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]


def same_shape_other_values(good: bytes) -> bytes:
    content = bytearray(gzip.decompress(good))
    content[-1] ^= 1
    return gzip.compress(bytes(content))


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (cut_short, "does not unpack"),
    "flipped byte": (flipped, "does not unpack"),
    "other IDX, other shape": (
        lambda _: gzip.compress(idx_bytes(np.zeros((5, 28, 28), np.uint8))),
        "another IDX",
    ),
    "other IDX, same shape": (same_shape_other_values, "SHA-256"),
    "empty": (lambda _: b"", "begins with nothing"),
    "a web page": (lambda _: b"<html>Please log in to this wifi</html>", "not IDX"),
    "unpacked and truncated": (lambda good: cut_short(gzip.decompress(good)), "and it holds"),
    "only a header": (lambda good: gzip.decompress(good)[:6], "ends within its header"),
}


every_damage = pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE.keys())


@pytest.mark.parametrize("zipped", [True, False])
def test_files_are_read_gzipped_or_unpacked(tiny: Tiny, zipped: bool) -> None:
    loaded = load("fashion-mnist", tiny.write(tiny.root / "mine", zipped=zipped))
    assert_is_the_stand_in(loaded, tiny)
    assert loaded.name == "fashion-mnist"
    assert loaded.train.images.shape == (20, 1, 28, 28)
    assert (loaded.train.images.dtype, loaded.train.labels.dtype) == (torch.uint8, torch.int64)
    assert (len(loaded.train), len(loaded.test)) == (20, 10)


def test_priority_is_argument_then_variable_then_system_then_cache_then_download(
    tiny: Tiny, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, named = tiny.write(tiny.root / "mine"), tiny.write(tiny.root / "named")
    tiny.write(tiny.system)
    tiny.write(tiny.cache)
    monkeypatch.setenv("STEPPE_DATA", str(named))
    assert load("fashion-mnist", mine).source == f"{mine} (data_dir)"
    assert load("fashion-mnist").source == f"{named} ($STEPPE_DATA)"
    monkeypatch.setenv("STEPPE_DATA", "")
    assert load("fashion-mnist").source == f"{tiny.system} (system package)"
    tiny.system.rename(tiny.root / "gone")
    assert load("fashion-mnist").source == f"{tiny.cache} (cache)"
    assert server.asked == []
    tiny.cache.rename(tiny.root / "also gone")
    assert_is_the_stand_in(load("fashion-mnist"), tiny)
    assert server.asked == [f"{name}.gz" for name in tiny.files]


def test_cache_is_in_the_home_directory_without_xdg(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tiny.root))
    place = tiny.write(tiny.root / ".cache" / "steppe" / "fashion-mnist")
    assert load("fashion-mnist").source == f"{place} (cache)"


@pytest.mark.parametrize("how", ["data_dir", "STEPPE_DATA"])
@pytest.mark.parametrize("place", ["empty", "absent", "a file", "one lacks"])
def test_a_given_directory_without_the_files_raises_and_no_other_is_read(
    tiny: Tiny, server: Server, monkeypatch: pytest.MonkeyPatch, how: str, place: str
) -> None:
    tiny.write(tiny.system)
    tiny.write(tiny.cache)
    mine = tiny.root / "mine"
    if place == "empty":
        mine.mkdir()
    elif place == "a file":
        mine.write_text("not a directory")
    elif place == "one lacks":
        (tiny.write(mine) / f"{IMAGES}.gz").unlink()
    named = mine if how == "STEPPE_DATA" else tiny.write(tiny.root / "named")
    monkeypatch.setenv("STEPPE_DATA", str(named))
    message = refusal(IMAGES, mine if how == "data_dir" else None)
    assert f"{mine} is not a directory that holds {IMAGES}" in message
    assert server.asked == []


@every_damage
@pytest.mark.parametrize("place", ["data_dir", "STEPPE_DATA", "system"])
def test_damage_outside_the_cache_is_reported_and_left_unchanged(
    tiny: Tiny,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    damage: Callable[[bytes], bytes],
    says: str,
) -> None:
    directory = tiny.write(tiny.system if place == "system" else tiny.root / "mine")
    if place == "STEPPE_DATA":
        monkeypatch.setenv("STEPPE_DATA", str(directory))
    path = directory / f"{IMAGES}.gz"
    bad = damage(path.read_bytes())
    path.write_bytes(bad)
    message = refusal(str(path), directory if place == "data_dir" else None)
    assert says in message
    assert "Delete it" in message
    assert path.read_bytes() == bad
    assert server.asked == []
    assert tiny.cached() == {}


@every_damage
def test_damage_in_the_cache_is_repaired(
    tiny: Tiny, server: Server, damage: Callable[[bytes], bytes], says: str
) -> None:
    path = tiny.write(tiny.cache) / f"{LABELS}.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert_is_the_stand_in(load("fashion-mnist"), tiny)
    assert server.asked == [f"{LABELS}.gz"]
    assert tiny.cached()[f"{LABELS}.gz"] == server.files[f"{LABELS}.gz"]
    assert_is_the_stand_in(load("fashion-mnist"), tiny)
    assert len(server.asked) == 1, "a healed file is not downloaded again"


def test_any_damage_in_the_cache_is_repaired_with_a_note(
    tiny: Tiny, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(100):
        paths = sorted(tiny.write(tiny.cache, zipped=seed % 8 < 4).iterdir())
        mutate(paths[seed % len(paths)], seed)
        server.asked.clear()
        caplog.clear()
        assert_is_the_stand_in(load("fashion-mnist"), tiny)
        assert len(server.asked) == caplog.text.count("it is removed and downloaded again")
        shutil.rmtree(tiny.cache)


def test_damage_in_the_cache_is_removed_without_a_network(tiny: Tiny) -> None:
    path = tiny.write(tiny.cache) / f"{LABELS}.gz"
    path.write_bytes(cut_short(path.read_bytes()))
    refusal(LABELS)
    assert sorted(tiny.cached()) == sorted(f"{name}.gz" for name in tiny.files if name != LABELS)


def test_a_good_gzipped_file_replaces_a_damaged_unpacked_one(tiny: Tiny, server: Server) -> None:
    (tiny.write(tiny.cache) / IMAGES).write_bytes(b"damaged")
    assert_is_the_stand_in(load("fashion-mnist"), tiny)
    assert IMAGES not in tiny.cached()
    assert server.asked == []


def test_damage_in_the_cache_that_cannot_be_removed_is_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write(tiny.cache) / f"{LABELS}.gz"
    path.write_bytes(b"damaged")
    monkeypatch.setattr(Path, "unlink", fails(errno.EACCES))
    assert "cannot be removed (Permission denied)" in refusal(str(path))


@pytest.mark.parametrize("place", ["data_dir", "cache"])
def test_an_unreadable_file_is_reported_and_kept(
    tiny: Tiny, server: Server, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    directory = tiny.write(tiny.cache if place == "cache" else tiny.root / "mine")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails(errno.EACCES))
        message = refusal(IMAGES, None if place == "cache" else directory)
    assert "cannot be read (Permission denied)" in message
    assert len(list(directory.iterdir())) == 4
    assert server.asked == []


def fails(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def test_no_network(tiny: Tiny) -> None:
    message = refusal(IMAGES)
    assert "Connection refused" in message
    assert f"{CLOSED_PORT}{IMAGES}.gz" in message
    assert tiny.cached() == {}


@pytest.mark.parametrize("status", [404, 403, 500])
def test_http_error(tiny: Tiny, server: Server, status: int) -> None:
    server.status[f"{IMAGES}.gz"] = status
    assert f"HTTP Error {status}" in refusal(IMAGES)
    assert tiny.cached() == {}


@pytest.mark.parametrize("announce_length", [True, False])
def test_connection_cut_midway(tiny: Tiny, server: Server, announce_length: bool) -> None:
    server.announce_length = announce_length
    server.cut_after[f"{IMAGES}.gz"] = 1000
    message = refusal(IMAGES)
    assert ("1000 bytes read" if announce_length else "does not unpack") in message
    assert tiny.cached() == {}
    server.cut_after.clear()
    assert_is_the_stand_in(load("fashion-mnist"), tiny)


def test_connection_that_stalls(tiny: Tiny, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "TIMEOUT", 0.1)
    server.cut_after[f"{IMAGES}.gz"] = 1000
    server.stall[f"{IMAGES}.gz"] = 0.5
    assert "timed out" in refusal(IMAGES)
    assert tiny.cached() == {}


@every_damage
def test_a_download_with_another_checksum_is_discarded(
    tiny: Tiny, server: Server, damage: Callable[[bytes], bytes], says: str
) -> None:
    server.files[f"{LABELS}.gz"] = damage(server.files[f"{LABELS}.gz"])
    message = refusal(LABELS)
    assert says in message
    assert "discarded" in message
    assert list(tiny.cached()) == [f"{IMAGES}.gz"], "the good one before it stays, and nothing else"


@pytest.mark.parametrize(
    ("module", "call", "code"),
    [
        (os, "fsync", errno.ENOSPC),
        (os, "fsync", errno.EDQUOT),
        (os, "replace", errno.EACCES),
        (fashion_mnist.tempfile, "mkstemp", errno.EACCES),
        (fashion_mnist.tempfile, "mkstemp", errno.EROFS),
    ],
)
def test_a_cache_that_cannot_be_written(
    tiny: Tiny, server: Server, monkeypatch: pytest.MonkeyPatch, module: Any, call: str, code: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, call, fails(code))
        message = refusal(str(tiny.cache / f"{IMAGES}.gz"))
    assert f"cannot be written ({os.strerror(code)})" in message
    assert "$XDG_CACHE_HOME" in message
    assert tiny.cached() == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no always-full device here")
def test_a_full_disk(tiny: Tiny, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tiny.root / "a.part"

    def on_a_full_disk(**_: Any) -> tuple[int, str]:
        part.touch()
        return os.open("/dev/full", os.O_WRONLY), str(part)

    monkeypatch.setattr(fashion_mnist.tempfile, "mkstemp", on_a_full_disk)
    assert "No space left on device" in refusal(IMAGES)
    assert not part.exists()
    assert tiny.cached() == {}


def test_a_user_without_a_home_directory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert "Set $XDG_CACHE_HOME" in refusal("Fashion-MNIST")


def test_a_cache_whose_path_is_taken_by_a_file(tiny: Tiny, server: Server) -> None:
    (tiny.root / "xdg").write_text("in the way")
    assert "cannot be written" in refusal(IMAGES)


def test_an_interrupt_leaves_nothing_behind(tiny: Tiny, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("fashion-mnist")
    assert tiny.cached() == {}


def test_the_file_is_not_in_place_before_it_is_on_the_disk(
    tiny: Tiny, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[str]]] = []

    def look(handle: int) -> None:
        seen.append((os.fstat(handle).st_size, [name for name in tiny.cached() if name.endswith(".gz")]))

    monkeypatch.setattr(os, "fsync", look)
    load("fashion-mnist")
    names = [f"{name}.gz" for name in tiny.files]
    assert [size for size, _ in seen] == [len(server.files[name]) for name in names]
    assert [sorted(present) for _, present in seen] == [sorted(names[:count]) for count in range(4)]


def test_threads_that_load_at_once_over_a_damaged_cache(tiny: Tiny, server: Server) -> None:
    for path in tiny.write(tiny.cache).iterdir():
        path.write_bytes(cut_short(path.read_bytes()))
    barrier = threading.Barrier(6)

    def together(_: int) -> data.Dataset:
        barrier.wait()
        return load("fashion-mnist")

    with ThreadPoolExecutor(6) as pool:
        for loaded in pool.map(together, range(6)):
            assert_is_the_stand_in(loaded, tiny)
    assert tiny.cached() == server.files


@pytest.mark.slow
def test_processes_that_load_at_once(tiny: Tiny, server: Server) -> None:
    program = (
        "import sys; from pathlib import Path; from steppe.experiments.data import fashion_mnist as f\n"
        "f.URL, directory, name, digest = sys.argv[1:]\n"
        "print(f.from_cache(Path(directory), f.IdxFile(name, (20, 28, 28), digest)).sum())"
    )
    file, content = tiny.files[IMAGES]
    command = [sys.executable, "-c", program, fashion_mnist.URL, str(tiny.cache), file.name, file.sha256]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = [int(process.communicate(timeout=120)[0]) for process in running]
    assert sums == [sum(content[16:])] * 3
    assert tiny.cached() == {f"{IMAGES}.gz": server.files[f"{IMAGES}.gz"]}


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_idx_round_trip(array: np.ndarray) -> None:
    parsed = parse_idx(idx_bytes(array))
    assert parsed.dtype == np.uint8
    assert parsed.shape == array.shape
    assert np.array_equal(parsed, array)


@settings(max_examples=300)
@given(st.data(), st.booleans())
def test_no_single_changed_byte_and_no_cut_changes_what_is_read(draw: st.DataObject, zipped: bool) -> None:
    file, content = stand_in("x", (4, 5), seed=0)
    good = gzip.compress(content, mtime=0) if zipped else content
    at = draw.draw(st.integers(0, len(good) - 1))
    changed = good[:at] + bytes([good[at] ^ draw.draw(st.integers(1, 255))]) + good[at + 1 :]
    with pytest.raises(ValueError, match="it "):
        unpack(good[:at], file)
    try:
        read = unpack(changed, file)
    except ValueError:
        return
    assert zipped, "only gzip has bytes that mean nothing here, such as the time"
    assert idx_bytes(read) == content


@pytest.fixture(scope="module")
def full() -> data.Dataset:
    if not (os.environ.get("STEPPE_DATA") or data.SYSTEM.is_dir()):
        pytest.skip("Fashion-MNIST is not here: `apt install dataset-fashion-mnist`, or set $STEPPE_DATA")
    return load("fashion-mnist")


@pytest.mark.full_data
def test_one_changed_byte_of_the_full_set_raises(tmp_path: Path, full: data.Dataset) -> None:
    file = fashion_mnist.TEST[1]
    content = bytearray(idx_bytes(full.test.labels.numpy().astype(np.uint8)))
    assert np.array_equal(unpack(bytes(content), file), full.test.labels.numpy())
    content[5000] ^= 1
    (tmp_path / file.name).write_bytes(content)
    with pytest.raises(DataError, match="SHA-256"):
        fashion_mnist.from_directory(tmp_path, file)


def test_file_that_unpacks_to_too_much_is_refused_before_it_fills_the_memory() -> None:
    bomb = gzip.compress(bytes(200_000_000), compresslevel=9)
    with pytest.raises(ValueError, match="it unpacks to more than [0-9]+ bytes"):
        fashion_mnist.unpack(bomb, fashion_mnist.TRAIN[1])


@pytest.mark.parametrize(("limit", "reason"), [("MAX_BYTES", "larger than -1 MB"), ("MAX_SECONDS", "more than -1 sec")])
def test_download_has_limits(limit: str, reason: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, limit, -1)
    with pytest.raises(OSError, match=reason):
        fashion_mnist._fetch(fashion_mnist.URL + next(iter(server.files)))


def test_redirect_from_https_to_http_is_not_followed() -> None:
    request = urllib.request.Request("https://example.org/file")
    redirects = fashion_mnist._SecureRedirects()
    for target in ("http://example.org/file", "ftp://example.org/file"):
        with pytest.raises(OSError, match="which is not https"):
            redirects.redirect_request(request, io.BytesIO(), 302, "Found", {}, target)
    followed = redirects.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://example.com/file")
    assert followed.full_url == "https://example.com/file"
