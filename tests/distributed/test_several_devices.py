"""examples/several_devices.py on two ranks: sharding changes no loss, and a perturbation for each rank does."""

import runpy
from pathlib import Path

import pytest
import torch

from layouts import skip_without_fsdp2
from ranks import start_ranks

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "several_devices.py"


def losses(way: str) -> tuple[float, float]:
    return runpy.run_path(str(EXAMPLE))["train"](way, steps=30)


def test_several_devices_example_gives_equal_losses_where_it_should():
    start_ranks()(skip_without_fsdp2, torch.float32)
    found = {way: start_ranks()(losses, way) for way in ("together", "per-rank", "sharded")}
    for way, (here, there) in found.items():
        assert here == there, way
    assert found["sharded"][0] == pytest.approx(found["together"][0], rel=1e-4)
    first, last = found["per-rank"][0]
    assert first == pytest.approx(found["together"][0][0], rel=1e-6)
    assert abs(last - found["together"][0][1]) > 1e-5, "a perturbation for each rank gave the same trajectory"
    assert torch.isfinite(torch.tensor(last))
