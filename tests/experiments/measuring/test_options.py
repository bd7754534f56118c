import pytest

from steppe.experiments.measuring.options import MeasuringOptions, Sampling


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"batch_size": -1}])
def test_samples_and_processes_are_at_least_one(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*at least one"):
        Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processes=0"):
        MeasuringOptions(processes=0)
