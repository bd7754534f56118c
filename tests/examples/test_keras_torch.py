"""examples/keras_torch.py defines a model that trains with SAM."""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras")

from example_files import load_example

# Keras 3.15 does not take the copy keyword of NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def test_keras_example_trains_with_sam():
    example = load_example("keras_torch.py")
    model = example.compiled(example.SAMNet)
    x = np.random.default_rng(0).normal(size=(32, 64)).astype("float32")
    model.fit(x, np.arange(32) % 10, verbose=0)
    assert repr(model.sam.perturbation) == "L2()"
    assert model.sam.param_groups[0]["sam_rho"] == 0.05
