"""examples/accelerate_loop.py prints results that its model confirms."""

import re

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from accelerate_state import fresh_accelerate_state  # noqa: F401
from example_files import run_example

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning", "ignore:.*joblib will operate in serial mode.*:UserWarning"
)


@pytest.mark.slow
def test_accelerate_loop_prints_passes_and_accuracy(capsys):
    example, text = run_example("accelerate_loop.py", capsys)
    assert "200 steps, 2.00 passes each" in text
    model = example["accelerator"].unwrap_model(example["model"]).eval()
    assert model[1].num_batches_tracked == 400, "10 epochs of 40 micro-batches, each counted in one pass"
    right = (model(example["x"][1280:]).argmax(-1) == example["y"][1280:]).float().mean().item()
    printed = float(re.search(r"test accuracy ([\d.]+)%", text)[1])
    assert printed == pytest.approx(100 * right, abs=0.006)
    assert right > 0.9
