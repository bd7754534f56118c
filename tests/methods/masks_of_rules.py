"""Points and masks for the tests of sparse perturbations."""

import torch

from steppe.rules import Perturbation, Point

SHAPES = [(30, 20), (7, 3, 3), (11,), ()]  # 675 numbers


def gradients(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(dtype) for shape in SHAPES]


def point(g: list[torch.Tensor], step: int = 0, memory: dict | None = None, w: list | None = None) -> Point:
    return Point(g if w is None else w, g, [1.0] * len(g), [{}] * len(g), step, {} if memory is None else memory)


def mask(rule: Perturbation, point: Point) -> torch.Tensor:
    """True where the direction is not zero: with LInf, the mask."""
    return torch.cat([d.reshape(-1) for d in rule(point).direction]) != 0
