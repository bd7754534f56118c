import dataclasses
import hashlib
import random
from pathlib import Path

import pytest
from mutations import damage_bytes

from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.forwarding import EVENTS
from steppe.experiments.execution.transfer import Receiver, SentFile, sees
from steppe.experiments.storage.run_folder import RunFolder


def sent(content: bytes) -> SentFile:
    return SentFile(content, hashlib.sha256(content).hexdigest())


def test_token_is_seen_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    token = tmp_path / ".shared-1"
    assert not sees(token)
    token.write_text("of another machine")
    assert not sees(token)
    token.write_text(token.name)
    assert sees(token)
    assert not sees(tmp_path / "another" / ".shared-1")


def test_token_that_a_network_file_system_shows_late_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / ".shared-1"
    monkeypatch.setattr("time.sleep", lambda seconds: token.write_text(token.name))
    assert sees(token)


def test_receiver_writes_what_the_latest_attempt_sends_and_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    receiver, folder = Receiver(tmp_path / "stop"), tmp_path / "run"
    receiver.expect(folder, "first")
    assert receiver.begin(folder, "first") == {}
    receiver.store(folder, "first", {"checkpoint.pt": sent(b"1"), "metrics.jsonl": sent(b"{}")})
    receiver.append_event(folder, "first", "begin\n")
    receiver.expect(folder, "second")  # the machine of the first is thought to be dead
    for call in (
        lambda: receiver.begin(folder, "first"),
        lambda: receiver.store(folder, "first", {"checkpoint.pt": sent(b"late")}),
        lambda: receiver.append_event(folder, "first", "late\n"),
        lambda: receiver.end(folder, "first"),
    ):
        with pytest.raises(ExperimentError, match="another worker has taken over the run"):
            call()
    assert receiver.begin(folder, "second") == {"checkpoint.pt": sent(b"1")}
    assert (folder / "metrics.jsonl").read_bytes() == b"{}"
    assert (folder / EVENTS).read_text() == "begin\n"


def test_folder_is_locked_while_an_attempt_sends_and_free_for_the_next_one(tmp_path: Path) -> None:
    receiver, folder = Receiver(tmp_path / "stop"), RunFolder(tmp_path / "run")
    for leave in (receiver.end, receiver.expect):  # it ends, or its machine dies
        receiver.expect(folder.path, "first")
        receiver.begin(folder.path, "first")
        with pytest.raises(ExperimentError, match="another process"), folder.locked():
            pass
        leave(folder.path, "first")
        with folder.locked():  # the next attempt may see the folder, and lock it itself
            pass


def test_receiver_passes_a_request_to_stop(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path / "stop")
    assert not receiver.stop_requested()
    (tmp_path / "stop").touch()
    assert receiver.stop_requested()


def test_file_that_was_damaged_on_the_way_is_not_written(tmp_path: Path) -> None:
    receiver, folder, other = Receiver(tmp_path / "stop"), tmp_path / "run", tmp_path / "way"
    receiver.expect(folder, "first")
    receiver.begin(folder, "first")
    content = b'{"standardized_epoch": 1}\n' * 20
    receiver.store(folder, "first", {"metrics.jsonl": sent(content)})
    for seed in range(60):
        other.write_bytes(content)
        damage_bytes(other, random.Random(seed))
        damaged = dataclasses.replace(sent(content), content=other.read_bytes())
        with pytest.raises(
            ExperimentError, match=r"metrics\.jsonl was damaged on the way between two machines"
        ) as error:
            receiver.store(folder, "first", {"metrics.jsonl": damaged})
        assert "\n" not in str(error.value)
        assert (folder / "metrics.jsonl").read_bytes() == content
