"""The examples print what a reader can check, and it is so."""

import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from accelerate.state import AcceleratorState, GradientState

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning", "ignore:.*joblib will operate in serial mode.*:UserWarning"
)


@pytest.fixture(autouse=True)
def _no_state_of_another_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def ran(name: str, capsys) -> tuple[dict, str]:
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out


def accuracy(text: str) -> float:
    return float(re.search(r"test accuracy ([\d.]+)%", text)[1])


def test_accelerate_loop(capsys):
    of, text = ran("accelerate_loop.py", capsys)
    assert "200 steps, 2.00 passes each" in text
    model = of["accelerator"].unwrap_model(of["model"]).eval()
    assert model[1].num_batches_tracked == 400, "10 epochs of 40 micro-batches, each counted in one pass"
    right = (model(of["x"][1280:]).argmax(-1) == of["y"][1280:]).float().mean().item()
    assert accuracy(text) == pytest.approx(100 * right, abs=0.006)
    assert right > 0.9


def test_transformers_trainer(capsys):
    of, text = ran("transformers_trainer.py", capsys)
    assert "120 steps, 2.00 passes each" in text
    with torch.no_grad():
        logits = of["model"].eval()(pixel_values=of["pixels"][1280:]).logits
    right = (logits.argmax(-1) == torch.tensor(of["labels"][1280:])).float().mean().item()
    assert accuracy(text) == pytest.approx(100 * right, abs=0.2), "the Trainer's batches round in their own way"
    assert right > 0.7
    assert len(re.search(r"by epoch:([ .\d]+)", text)[1].split()) == 6
