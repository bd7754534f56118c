"""examples/transformers_trainer.py prints results that its model confirms."""

import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from accelerate_state import fresh_accelerate_state  # noqa: F401
from example_files import run_example

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning", "ignore:.*joblib will operate in serial mode.*:UserWarning"
)


@pytest.mark.slow
def test_transformers_trainer_prints_passes_accuracy_and_sharpness(capsys):
    example, text = run_example("transformers_trainer.py", capsys)
    assert "120 steps, 2.00 passes each" in text
    with torch.no_grad():
        logits = example["model"].eval()(pixel_values=example["pixels"][1280:]).logits
    right = (logits.argmax(-1) == torch.tensor(example["labels"][1280:])).float().mean().item()
    printed = float(re.search(r"test accuracy ([\d.]+)%", text)[1])
    assert printed == pytest.approx(100 * right, abs=0.2), "batches of another size round differently"
    assert right > 0.7
    assert len(re.search(r"by epoch:([ .\d]+)", text)[1].split()) == 6
