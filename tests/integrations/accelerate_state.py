"""Helpers of the tests of Accelerate: a reset of its global state, and the loop of the documentation."""

import pytest
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from steppe.integrations.accelerate import passes, windows


def reset_accelerate_state() -> None:
    """Forget the last Accelerator; its classes keep their state for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train_epoch(accelerator: Accelerator, model, optimizer, batches_of_rank) -> None:
    """Train for an epoch by the loop of the documentation, with accumulation and clipping."""
    for batches in windows(accelerator, batches_of_rank):
        for sam_pass in passes(accelerator, optimizer, len(batches)):
            with sam_pass:
                for x, y in batches:
                    with accelerator.accumulate(model):
                        accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    reset_accelerate_state()
    yield
    reset_accelerate_state()
