"""A pre-activation ResNet-18 for small images.

References:
    He, Zhang, Ren and Sun 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "group"]

MAX_GROUPS = 8
STAGES = (2, 2, 2, 2)
"""The number of blocks of each stage: those of a ResNet-18."""


class PreActResNet18(nn.Module):
    """A 3x3 stem, four stages of two blocks each, a last norm and ReLU, average pooling, a linear head.

    Maps images (n, in_channels, h, w) to logits (n, num_classes). `width` is the number of channels of the first stage;
    each further stage has twice as many. `stem_stride=2` halves the height and width of all features. `norm="group"` is
    for training in several processes on CPUs, where there is no SyncBatchNorm: it normalizes each image by itself.

    Weights have torch's default initialization. Raises ValueError when a size is below 1 or `norm` is unknown.

    >>> sum(p.numel() for p in PreActResNet18().parameters())
    11171018
    """

    def __init__(
        self,
        width: int = 64,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        stem_stride: int = 1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        sizes = {"width": width, "in_channels": in_channels, "num_classes": num_classes, "stem_stride": stem_stride}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, but must be at least 1")
        self.stem = _conv3x3(in_channels, width, stem_stride)
        blocks: list[nn.Module] = []
        channels = width
        for stage, number in enumerate(STAGES):
            out_channels = width * 2**stage
            for block in range(number):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(PreActBlock(channels, out_channels, stride, norm))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = _norm(norm, channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class PreActBlock(nn.Module):
    """x -> shortcut + conv2(relu(norm2(conv1(a)))), where a = relu(norm1(x)).

    The shortcut is x itself; where the shape changes it is a 1x1 convolution of a. Features
    (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride), rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = _norm(norm, in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm2 = _norm(norm, out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels, 1)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(a)
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(a))))
        return residual + shortcut


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        groups = max(g for g in range(1, MAX_GROUPS + 1) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    raise ValueError(f"norm is {norm!r}, but must be one of {get_args(Norm)}")
