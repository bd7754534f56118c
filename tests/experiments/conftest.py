import pytest

from steppe.experiments.execution import cpus


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process, unless a test asks for several: to start one takes longer than a tiny run."""
    monkeypatch.setattr(cpus, "available", lambda: 1)
