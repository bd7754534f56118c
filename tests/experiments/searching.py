"""Searches on tiny data."""

import json
from pathlib import Path

import pytest
from tiny import command_line, dataset, options, shallow, untimed

from steppe.cli import main
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.tuning.result import TrialResult


class DataWithoutTest(Dataset):
    """A data set whose test set must not be read."""

    @property
    def test(self) -> data.Split:  # type: ignore[override]
        raise AssertionError("the test set was read")


def data_without_test() -> Dataset:
    whole, made = dataset(train=144), object.__new__(DataWithoutTest)
    for name in ("name", "train", "source"):
        object.__setattr__(made, name, getattr(whole, name))
    return made


def command(out: Path, **fields: object) -> list[str]:
    given = {"methods": "sgd sam", "epochs": 2, "seeds": 2, "trials": 8, "out": out}
    return ["tune", "demo", *options(**(given | fields))]


def tuned(words: list[str], monkeypatch: pytest.MonkeyPatch | None = None, *, draws: bool = True) -> int:
    """Run the command line on tiny data; with `monkeypatch`, on data whose test set raises when it is read."""
    if monkeypatch is None:
        return command_line(words, draws=draws)
    monkeypatch.setattr(data, "load", lambda *_: data_without_test())
    shallow(monkeypatch)  # where this is a process of its own
    return main(words)


def trials(out: Path) -> list[dict[str, object]]:
    *lines, _ = (out / "trials.jsonl").read_text().splitlines()  # the last one is the checksum
    results = [TrialResult.from_json(json.loads(line)) for line in lines]
    return [vars(result) | {"runs": untimed(list(result.runs))} for result in results]
