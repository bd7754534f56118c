"""Corruptions of images, each with five severities.

The definitions are those of Hendrycks and Dietterich, with severities for gray images of about 28 x 28 pixels. What
differs from theirs: images stay floating point and are not rounded to bytes; brightness is added to each channel, not
to the value of HSV; salt and pepper, their "impulse noise", has the severities of small images; a shift is not among
theirs, and is the translation of MNIST-C by whole pixels.

References:
    Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
    https://arxiv.org/abs/1903.12261.
    Mu and Gilmer 2019, MNIST-C: A Robustness Benchmark for Computer Vision, https://arxiv.org/abs/1906.02337.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from steppe.experiments.data.sampling import seed_of
from steppe.experiments.errors import unknown

SEVERITY = 3
"""The usual severity."""
BLOCK = 500
"""Images that share one generator; so the draws do not depend on the size of a batch, and need little memory."""

ImageFunction = Callable[[Tensor, torch.Generator], Tensor]
"""A corruption of a user's own: (images in [0, 1], generator of the CPU) -> images of the same shape."""


@dataclass(frozen=True)
class Corruption:
    """A function (images, level, generator) -> images, and its level at each severity from 1 to 5."""

    name: str
    function: Callable[[Tensor, float, torch.Generator], Tensor]
    levels: tuple[float, float, float, float, float]
    meaning: str
    """What a level is."""

    def __call__(self, images: Tensor, generator: torch.Generator, severity: int = SEVERITY) -> Tensor:
        """Corrupt floating-point images (n, channels, height, width) in [0, 1]; severity 0 returns them unchanged.

        All random numbers come from `generator`, which is the CPU's whatever the device of the images.
        """
        if severity not in range(len(self.levels) + 1):
            raise ValueError(f"{self.name}: severity={severity} must be a whole number from 0 to {len(self.levels)}")
        if severity == 0:
            return images
        return self.function(images, self.levels[severity - 1], generator)


def corrupt(images: Tensor, name: str, severity: int = SEVERITY, *, seed: int = 0) -> Tensor:
    """Return corrupted images; the same for the same seed on every device.

    Args:
        images: Floating-point images in [0, 1], (n, channels, height, width).
        name: A name in `CORRUPTIONS`.
        severity: 0 (unchanged) to 5.
        seed: Seed of the random numbers. They are the same for all severities.

    Example:
        >>> corrupt(torch.full((1, 1, 2, 2), 0.5), "brightness", 2)
        tensor([[[[0.5980, 0.5980],
                  [0.5980, 0.5980]]]])
    """
    check_images(images)
    corruption = find(name)
    parts = zip(torch.split(images, BLOCK), generators(name, seed), strict=False)
    return torch.cat([corruption(part, draws, severity) for part, draws in parts])


def find(name: str) -> Corruption:
    """Return a corruption by its name; ValueError, with the closest one, if there is none."""
    if name not in CORRUPTIONS:
        raise ValueError(unknown("corruptions", name, CORRUPTIONS))
    return CORRUPTIONS[name]


def generators(name: str, seed: int) -> Iterator[torch.Generator]:
    """Yield the generator of each block of images."""
    block = 0
    while True:
        yield torch.Generator().manual_seed(seed_of(seed, zlib.crc32(name.encode()), block))
        block += 1


def check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError for images that are not floating point in [0, 1]."""
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"images of shape {tuple(images.shape)}: (n, channels, height, width) is needed, n at least 1")
    if not images.is_floating_point():
        raise TypeError(
            f"images are {images.dtype}: floating-point numbers in [0, 1] are needed, images / 255 of bytes"
        )
    low, high = (float(bound) for bound in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"images have values from {low:.4g} to {high:.4g}, and a corruption is defined on [0, 1]: give the images "
            "as they were before they were normalized"
        )


def _gaussian_noise(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator).to(images)
    return (images + sigma * noise).clamp(0, 1)


def _salt_and_pepper(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(images.shape, generator=generator).to(images.device)
    salted = torch.where(uniform < share, 1.0, images)
    return torch.where(uniform < share / 2, 0.0, salted)


def _blur(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Filter with a Gaussian, one axis after the other, beyond the border with the pixel at the border.

    By sums of shifted images: a convolution of a GPU may compute in TF32, and round to 10 bits.
    """
    radius = math.floor(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        size, padded = images.shape[axis], F.pad(images, padding, mode="replicate")
        images = torch.zeros_like(images)
        for i, weight in enumerate(weights):
            images += weight / sum(weights) * padded.narrow(axis, i, size)
    return images.clamp_(0, 1)


def _brightness(images: Tensor, summand: float, generator: torch.Generator) -> Tensor:
    return (images + summand).clamp(0, 1)


def _contrast(images: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return ((images - mean) * factor + mean).clamp(0, 1)


def _shift(images: Tensor, pixels: float, generator: torch.Generator) -> Tensor:
    """Move each image diagonally, half of the pixels up or down and the rest left or right; 0 fills the border."""
    down, right = int(pixels) // 2, int(pixels) - int(pixels) // 2
    directions = torch.randint(4, (len(images),), generator=generator)
    shifted = torch.empty_like(images)
    (height, width), padded = images.shape[2:], F.pad(images, (right, right, down, down))
    for direction in range(4):
        chosen = (directions == direction).nonzero().flatten().to(images.device)
        top, left = (direction // 2) * 2 * down, (direction % 2) * 2 * right
        shifted[chosen] = padded[chosen, :, top : top + height, left : left + width]
    return shifted


def _bytes(*levels: float) -> tuple[float, float, float, float, float]:
    first, second, third, fourth, fifth = (level / 255 for level in levels)
    return first, second, third, fourth, fifth


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        c.name: c
        for c in (
            Corruption("gaussian_noise", _gaussian_noise, _bytes(10, 15, 25, 35, 50), "standard deviation"),
            Corruption("salt_and_pepper", _salt_and_pepper, (0.01, 0.03, 0.05, 0.1, 0.2), "share of the pixels"),
            Corruption("blur", _blur, (0.4, 0.6, math.sqrt(2 / 3), 1.0, 1.5), "standard deviation in pixels"),
            Corruption("brightness", _brightness, _bytes(10, 25, 40, 55, 75), "summand"),
            Corruption("contrast", _contrast, (0.75, 0.6, 0.5, 0.35, 0.2), "factor of the distance from the mean"),
            Corruption("shift", _shift, (1, 2, 4, 6, 8), "pixels, vertical and horizontal together"),
        )
    }
)
"""The corruptions by name. At severity 3, the Gaussian of `blur` has the variance of a mean over 3 x 3 pixels."""
