"""The periodic cadence against its slow reference."""

import pytest

import steppe
from checks import matches_reference


@pytest.mark.parametrize("interval", [2, 3])
def test_every_interval_has_one_perturbed_step(interval):
    matches_reference("sam", "momentum", "passes", interval=interval)


@pytest.mark.parametrize("interval", [2, 3])
def test_mutant_wrong_interval_is_killed(monkeypatch, interval):
    wrong = steppe.Periodic(interval + 1)
    monkeypatch.setattr(steppe, "Periodic", lambda _: wrong)
    with pytest.raises(AssertionError):
        matches_reference("sam", "momentum", "passes", interval=interval)


def test_interval_of_zero_is_an_error():
    with pytest.raises(ValueError, match="interval must be 1 or more"):
        steppe.Periodic(0)
