"""C23: FSDP2, tensor parallelism and mixtures train as one process does."""

import pytest
import torch

import layouts
from layouts import LAYOUTS, VARIANTS, named, plain, train
from ranks import together


def ranked(layout: str, name: str, steps: int):
    return train(LAYOUTS[layout], named(name), steps, whole_batch=layout == "tensor parallel")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*VARIANTS, *layouts.OWN])
def test_every_method_equals_one_process(name, layout):
    expected = train(plain, named(name), 4)
    for found in together()(ranked, layout, name, 4):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
