"""The loss on normalized logits."""

import torch

from steppe.flatness import normalized_logits


def test_normalized_logits_are_centered_and_have_unit_norm():
    seen = []
    normalized_logits(lambda f, y: seen.append(f))(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]), None)
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]) / 14**0.5
    torch.testing.assert_close(seen[0], expected)
