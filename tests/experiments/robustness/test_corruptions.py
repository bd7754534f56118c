import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from steppe.experiments.data.datasets import load
from steppe.experiments.robustness.corruptions import BLOCK, CORRUPTIONS, corrupt, find, generators

RANDOM = ("gaussian_noise", "salt_and_pepper", "shift")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Natural pictures in two blocks, with values away from 0 and 1, so that nothing is clipped by small changes."""
    pixels = load("sample").test.images[: BLOCK + 40].float() / 255
    return 0.3 + 0.4 * pixels


def distance(images: torch.Tensor, name: str, severity: int) -> float:
    return float((corrupt(images, name, severity) - images).square().mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_zero_changes_nothing(images: torch.Tensor, name: str) -> None:
    assert torch.equal(corrupt(images, name, 0), images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_the_images_more_than_the_one_before(images: torch.Tensor, name: str) -> None:
    distances = [distance(images, name, severity) for severity in range(6)]
    assert distances == sorted(distances)
    assert len(set(distances)) == 6


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_images_have_the_range_shape_and_type_of_the_originals(name: str) -> None:
    pixels = torch.rand(3, 3, 5, 7, dtype=torch.float64)
    for severity in range(1, 6):
        found = corrupt(pixels, name, severity)
        assert found.shape == pixels.shape
        assert found.dtype == pixels.dtype
        assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_originals_and_global_generators_are_unchanged(images: torch.Tensor, name: str) -> None:
    before, state = images.clone(), torch.get_rng_state()
    corrupt(images, name, 5)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", RANDOM)
def test_draws_depend_on_the_seed_alone(images: torch.Tensor, name: str) -> None:
    first = corrupt(images, name, seed=3)
    torch.rand(5)
    assert torch.equal(corrupt(images, name, seed=3), first)
    assert not torch.equal(corrupt(images, name, seed=4), first)


@pytest.mark.parametrize("name", RANDOM)
def test_two_blocks_have_different_draws(name: str) -> None:
    same = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0)).expand(2 * BLOCK, 1, 9, 9)
    first, second = corrupt(same, name, seed=0).split(BLOCK)
    assert not torch.equal(first, second)


def test_gaussian_noise_has_its_standard_deviation_and_no_mean() -> None:
    noise = corrupt(torch.full((100, 1, 28, 28), 0.5), "gaussian_noise", 3) - 0.5
    assert float(noise.std()) == pytest.approx(25 / 255, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.001)


def test_all_severities_of_gaussian_noise_scale_the_same_noise() -> None:
    gray = torch.full((2, 1, 8, 8), 0.5)
    weak, strong = (corrupt(gray, "gaussian_noise", severity) - 0.5 for severity in (1, 3))
    torch.testing.assert_close(strong, 2.5 * weak)


def test_salt_and_pepper_replaces_its_share_half_by_white_and_half_by_black() -> None:
    found = corrupt(torch.full((200, 1, 28, 28), 0.5), "salt_and_pepper", 3)
    assert float((found == 1).double().mean()) == pytest.approx(0.025, rel=0.05)
    assert float((found == 0).double().mean()) == pytest.approx(0.025, rel=0.05)
    assert set(found.unique().tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("severity", range(1, 6))
def test_blur_is_scipys_gaussian_filter(images: torch.Tensor, severity: int) -> None:
    sigma = (0.4, 0.6, math.sqrt(2 / 3), 1.0, 1.5)[severity - 1]
    original = images[:3].double()
    expected = ndimage.gaussian_filter(original.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    np.testing.assert_allclose(corrupt(original, "blur", severity).numpy(), expected, rtol=0, atol=1e-14)


def test_blur_of_severity_three_spreads_as_far_as_a_mean_over_three_by_three_pixels() -> None:
    point = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    point[0, 0, 15, 15] = 1
    offsets = torch.arange(31, dtype=torch.float64) - 15
    variance = (corrupt(point, "blur", 3)[0, 0].sum(0) * offsets.square()).sum()
    assert float(variance) == pytest.approx(2 / 3, rel=2e-3)  # of -1, 0, 1


def test_brightness_adds_its_level_and_clips() -> None:
    pixels = torch.tensor([0.0, 0.5, 0.95], dtype=torch.float64).reshape(1, 1, 1, 3)
    expected = torch.tensor([40 / 255, 0.5 + 40 / 255, 1.0], dtype=torch.float64)
    torch.testing.assert_close(corrupt(pixels, "brightness", 3).flatten(), expected, rtol=0, atol=1e-15)


def test_contrast_halves_the_distance_from_the_mean_of_each_image_and_channel(images: torch.Tensor) -> None:
    colored = torch.cat([images[:4], images[4:8], images[8:12]], 1).double().numpy()
    mean = colored.mean((2, 3), keepdims=True)
    found = corrupt(torch.from_numpy(colored), "contrast", 3).numpy()
    np.testing.assert_allclose(found, mean + 0.5 * (colored - mean), rtol=0, atol=1e-15)


def test_shift_moves_each_image_two_pixels_along_both_axes_and_fills_with_black() -> None:
    pixels = 0.1 + 0.9 * torch.rand(80, 2, 9, 11)
    found = corrupt(pixels, "shift", 3)
    seen = set()
    for original, shifted in zip(pixels, found, strict=True):
        for down in (-2, 2):
            for right in (-2, 2):
                expected = ndimage.shift(original.numpy(), (0, down, right), order=0, cval=0.0)
                if np.array_equal(shifted.numpy(), expected):
                    seen.add((down, right))
                    break
            else:
                continue
            break
        else:
            pytest.fail("an image is not shifted by two pixels")
    assert len(seen) == 4


def test_odd_shifts_move_one_pixel_further_to_the_side() -> None:
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 1
    ((_, _, row, column),) = corrupt(point, "shift", 1).nonzero().tolist()
    assert (abs(row - 2), abs(column - 2)) == (0, 1)


def test_shift_beyond_the_border_leaves_black() -> None:
    assert not corrupt(torch.ones(4, 1, 3, 3), "shift", 5).any()


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.zeros(2, 28, 28), ValueError, r"\(n, channels, height, width\)"),
        (torch.zeros(0, 1, 2, 2), ValueError, "n at least 1"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), TypeError, "images / 255"),
        (torch.full((1, 1, 2, 2), -0.8), ValueError, "before they were normalized"),
        (torch.full((1, 1, 2, 2), torch.nan), ValueError, "before they were normalized"),
    ],
)
def test_images_that_are_not_in_the_unit_range_raise_an_error(
    bad: torch.Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        corrupt(bad, "brightness")


def test_unknown_name_raises_with_the_closest_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'gaussian_noise'"):
        corrupt(torch.zeros(1, 1, 2, 2), "gausian_noise")


@pytest.mark.parametrize("severity", [-1, 6, 2.5])
def test_unknown_severity_raises(severity: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 5"):
        find("blur")(torch.zeros(1, 1, 2, 2), next(generators("blur", 0)), severity)
