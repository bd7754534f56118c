"""Names and shapes of the parameters of three networks, computed from their architectures without building them."""

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import TypeAlias

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def weights(shapes: Shapes) -> int:
    """Return the number of weights.

    >>> weights({"weight": (3, 2), "bias": (3,)})
    9
    """
    return sum(prod(shape) for shape in shapes.values())


def resnet18(width: int = 64, classes: int = 1000) -> Shapes:
    """ResNet-18 for ImageNet: four stages of two basic blocks, of 1, 2, 4 and 8 times ``width`` channels."""
    shapes = _convolution("conv1", "bn1", 3, width, 7)
    channels = width
    for stage in range(4):
        out = width << stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            shapes |= _convolution(f"{name}.conv1", f"{name}.bn1", channels, out, 3)
            shapes |= _convolution(f"{name}.conv2", f"{name}.bn2", out, out, 3)
            if channels != out:
                shapes |= _convolution(f"{name}.downsample.0", f"{name}.downsample.1", channels, out, 1)
            channels = out
    return shapes | _linear("fc", channels, classes)


def vit_b16(width: int = 768, layers: int = 12, patch: int = 16, image: int = 224, classes: int = 1000) -> Shapes:
    """ViT-B/16: one token per patch of 16 x 16 pixels, 12 layers of width 768, hidden layers four times as wide."""
    shapes: Shapes = {
        "class_token": (1, 1, width),
        "position": (1, (image // patch) ** 2 + 1, width),
        "patches.weight": (width, 3, patch, patch),
        "patches.bias": (width,),
    }
    for layer in range(layers):
        shapes |= _layer(f"layers.{layer}", width)
    return shapes | _norm("norm", width) | _linear("head", width, classes)


def decoder(width: int = 1792, layers: int = 24, tokens: int = 50257, context: int = 2048) -> Shapes:
    """A GPT-2-like decoder of 1.0 B weights: 24 layers of width 1792, 50,257 tokens, learned positions, a tied head."""
    shapes: Shapes = {"tokens": (tokens, width), "positions": (context, width)}
    for layer in range(layers):
        shapes |= _layer(f"layers.{layer}", width)
    return shapes | _norm("norm", width)


CASES: Mapping[str, Callable[[], Shapes]] = MappingProxyType(
    {"resnet18": resnet18, "vit_b16": vit_b16, "decoder_1b": decoder}
)
TITLES: Mapping[str, str] = MappingProxyType(
    {"resnet18": "ResNet-18", "vit_b16": "ViT-B/16", "decoder_1b": "a decoder of 1 B weights"}
)


def toy(case: str) -> Shapes:
    """Return the case's shapes with at most two entries per dimension, to time the host."""
    return {name: tuple(min(size, 2) for size in shape) for name, shape in CASES[case]().items()}


def _layer(name: str, width: int) -> Shapes:
    """Return a transformer layer: attention with one matrix for its three projections, and a multi-layer perceptron."""
    return (
        _norm(f"{name}.norm1", width)
        | _linear(f"{name}.attention.in", width, 3 * width)
        | _linear(f"{name}.attention.out", width, width)
        | _norm(f"{name}.norm2", width)
        | _linear(f"{name}.mlp.0", width, 4 * width)
        | _linear(f"{name}.mlp.1", 4 * width, width)
    )


def _convolution(name: str, norm: str, channels: int, out: int, size: int) -> Shapes:
    return {f"{name}.weight": (out, channels, size, size), **_norm(norm, out)}


def _linear(name: str, width: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
