from collections.abc import Iterator

import pytest
import torch

from steppe.experiments import cpus


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks are slower on two threads, and very much so on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process, unless a test asks for several: to start one takes longer than a tiny run."""
    monkeypatch.setattr(cpus, "available", lambda: 1)
