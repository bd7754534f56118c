import pytest
import torch

from steppe.experiments.robustness.second_tasks import inverted, of_classes, rotated


def test_images_of_some_classes_keep_their_order_and_labels() -> None:
    images, labels = torch.arange(6.0).reshape(6, 1, 1, 1), torch.tensor([3, 0, 1, 3, 2, 0])
    chosen, kept = of_classes(images, labels, range(2))
    assert chosen.flatten().tolist() == [1, 2, 5]
    assert kept.tolist() == [0, 1, 0]


def test_parts_of_the_classes_share_out_all_images() -> None:
    images, labels = torch.rand(30, 1, 2, 2), torch.arange(30) % 10
    first, second = (of_classes(images, labels, half)[1] for half in (range(5), range(5, 10)))
    assert sorted([*first.tolist(), *second.tolist()]) == sorted(labels.tolist())


def test_four_quarter_turns_are_none() -> None:
    images = torch.rand(3, 1, 4, 4)
    turned = images
    for _ in range(4):
        assert turned.is_contiguous()
        turned = rotated(turned)
    assert torch.equal(turned, images)
    assert torch.equal(rotated(images, 2), images.flip(2, 3))
    assert not torch.equal(rotated(images), images)


def test_images_that_are_not_square_cannot_be_turned() -> None:
    with pytest.raises(ValueError, match="size, size"):
        rotated(torch.zeros(1, 1, 2, 3))


def test_inverted_bytes_are_the_inverted_fractions() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(inverted(pixels).double() / 255, inverted(pixels.double() / 255))
    assert inverted(pixels).dtype == torch.uint8
