"""The loss on normalized logits."""

import pytest
import torch
import torch.nn.functional as F

from steppe.flatness import normalized_logits


def test_normalized_logits_are_centered_and_have_unit_norm():
    seen = []
    normalized_logits(lambda f, y: seen.append(f))(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]), None)
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]) / 14**0.5
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2), (2, 3, 4, 4)])
def test_outputs_that_are_no_logits_of_three_classes_raise(shape):
    with pytest.raises(ValueError, match=r"\(batch, classes\) with three classes or more, but the outputs have shape"):
        normalized_logits(F.cross_entropy)(torch.ones(shape), torch.zeros(shape[0], dtype=torch.long))
