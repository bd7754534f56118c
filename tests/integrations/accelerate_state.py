"""A fixture that resets the global state of Accelerate."""

import pytest
from accelerate.state import AcceleratorState, GradientState


def reset_accelerate_state() -> None:
    """Forget the last Accelerator; its classes keep their state for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    reset_accelerate_state()
    yield
    reset_accelerate_state()
