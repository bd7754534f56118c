"""All measures of a trained image classifier in one call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from types import MappingProxyType

import torch
from torch import Tensor, nn

from steppe.experiments.data.accuracy import accuracy
from steppe.experiments.data.sampling import seed_of
from steppe.experiments.errors import ExperimentError
from steppe.experiments.robustness.calibration import calibration
from steppe.experiments.robustness.corruptions import BLOCK, CORRUPTIONS, SEVERITY, ImageFunction, find, generators
from steppe.experiments.robustness.corruptions import check_images as check_images_in_range
from steppe.experiments.robustness.isolation import (
    device_of,
    evaluation,
    restored_generators,
    seed_generators_with_device,
)
from steppe.flatness.quantization import round_weights

BITS = (8, 4, 3, 2)
_NONE: Mapping[str, ImageFunction] = MappingProxyType({})


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    corruptions: Iterable[str] = tuple(CORRUPTIONS),
    own: Mapping[str, ImageFunction] = _NONE,
    bits: Iterable[int] = BITS,
    per_channel: bool = False,
    seed: int = 0,
    batch_size: int = BLOCK,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    raise_if_stopped: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Measure a trained classifier on test images: clean, corrupted, calibrated, with rounded weights.

    The model is evaluated once for each corruption and number of bits, and once for the rest. Its weights, buffers and
    modes and all global random generators are left as they were, bit for bit.

    Args:
        model: The classifier, which returns logits (n, classes). It gets images of the dtype of its first weights.
        images: Test images (n, channels, height, width), bytes or floating-point numbers in [0, 1].
        labels: Their classes, (n,).
        mean: Subtracted from the (corrupted) images before the model gets them: a number, or one for each channel.
        std: By which they are divided then.
        corruptions: Names of `CORRUPTIONS`, or NAME:SEVERITY for another severity than 3.
        own: Further corruptions by name: functions (images in [0, 1], generator of the CPU) -> images.
        bits: Numbers of bits to which weight matrices are rounded.
        per_channel: Round each output channel by a step of its own.
        seed: Seed of the corruptions. All models of a comparison get the same images by the same seed.
        batch_size: Largest number of images in a forward pass.
        autocast: Function that returns a context for each forward pass, such as a `torch.autocast`.
        raise_if_stopped: Called before each forward pass.

    Returns:
        "accuracy" in percent, "accuracy under NAME" of each corruption and "accuracy under corruptions", their mean;
        "calibration error" in percentage points, "negative log-likelihood" and "Brier score"; "accuracy at N bits".

    Raises:
        ExperimentError: A function in `own` returned something else than images of the same shape.
    """
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    shift, scale = (_by_channel(value, device) for value in (mean, std))

    def logits(corrupted: Iterable[Tensor]) -> Tensor:
        found = []
        for block in corrupted:
            for part in torch.split(block, batch_size):
                raise_if_stopped()
                with autocast():
                    outputs = model(((part - shift) / scale).to(dtype))
                found.append(getattr(outputs, "logits", outputs).float())
        return torch.cat(found)

    functions = {name: _built_in(name) for name in corruptions} | dict(own)
    _check(images, labels, bits := tuple(bits), batch_size)
    labels = labels.to(device)
    with restored_generators(device), evaluation(model):
        clean = logits(_blocks(images, device))
        found = {"accuracy": accuracy(clean, labels)}
        for name, function in functions.items():
            corrupted = _corrupted(images, name, function, seed, device)
            found[f"accuracy under {name}"] = accuracy(logits(corrupted), labels)
        if functions:
            found["accuracy under corruptions"] = sum(found[f"accuracy under {n}"] for n in functions) / len(functions)
        calibrated = calibration(clean, labels)
        found["calibration error"] = 100 * calibrated.error
        found["negative log-likelihood"] = calibrated.negative_log_likelihood
        found["Brier score"] = calibrated.brier_score
        for number in bits:
            with round_weights(model, number, per_channel=per_channel):
                found[f"accuracy at {number} bits"] = accuracy(logits(_blocks(images, device)), labels)
    return found


def _check(images: Tensor, labels: Tensor, bits: tuple[int, ...], batch_size: int) -> None:
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images, but labels of shape {tuple(labels.shape)}: one for each is needed")
    check_images_in_range(images if images.is_floating_point() else images[:1].float() / 255)
    if images.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"images are {images.dtype}: give bytes (torch.uint8) or floating-point numbers in [0, 1]")
    if any(number < 2 for number in bits):
        raise ValueError(f"bits={bits}: a sign and a value need at least 2")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")


def _by_channel(value: float | Sequence[float], device: torch.device) -> float | Tensor:
    if isinstance(value, int | float):
        return value
    return torch.tensor(value, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)


def _built_in(name: str) -> ImageFunction:
    """Return the function of NAME or NAME:SEVERITY."""
    base, colon, severity = name.partition(":")
    corruption = find(base)
    if colon and severity not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"corruptions: {name!r} has no severity from 1 to 5 after the colon, as in {base}:5")
    level = int(severity) if colon else SEVERITY
    return lambda images, generator: corruption(images, generator, level)


def _blocks(images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yield the images in [0, 1], a block at a time, as copies on the device."""
    for block in torch.split(images, BLOCK):
        moved = block.to(device)
        yield moved.float() / 255 if moved.dtype == torch.uint8 else moved.to(torch.float32, copy=True)


def _corrupted(images: Tensor, name: str, function: ImageFunction, seed: int, device: torch.device) -> Iterator[Tensor]:
    base = name.partition(":")[0]  # all severities have the same draws
    for block, draws, number in zip(_blocks(images, device), generators(base, seed), count(), strict=False):
        # for functions of a user's own that draw from the global generators
        seed_generators_with_device(seed_of(seed, number), device)
        corrupted = function(block, draws)
        if not isinstance(corrupted, Tensor) or corrupted.shape != block.shape:
            got = f"shape {tuple(corrupted.shape)}" if isinstance(corrupted, Tensor) else type(corrupted).__name__
            raise ExperimentError(
                f"the corruption {name} returned {got} for images of shape {tuple(block.shape)}: it must return as "
                "many images of the same shape"
            )
        yield corrupted.to(block)
