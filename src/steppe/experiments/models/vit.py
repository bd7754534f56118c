"""A vision transformer for small images.

References:
    Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929.
    Beyer, Zhai and Kolesnikov 2022, Better plain ViT baselines for ImageNet-1k, https://arxiv.org/abs/2205.01580.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4
HEAD = 16
"""Features of a head of the attention; a width is a multiple of it."""


class VisionTransformer(nn.Module):
    """A linear map of each patch of 4 x 4 pixels, learned positions, four blocks, the mean over patches, a linear head.

    Maps images (n, in_channels, image_size, image_size) to logits (n, num_classes). `width` is the dimension of a
    patch's features, a multiple of 16: each head of the attention has 16 of them. There is no dropout. Attention is
    written in plain operations, which have second derivatives on every device, so flatness can be measured.

    Raises ValueError for a width that is no positive multiple of 16, or an image that is not a whole number of patches.

    >>> VisionTransformer(64)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, width: int = 64, *, depth: int = 4, in_channels: int = 1, image_size: int = 28, num_classes: int = 10
    ) -> None:
        super().__init__()
        if width < HEAD or width % HEAD:
            raise ValueError(
                f"width is {width}, but must be a multiple of {HEAD}, the features of a head of the attention"
            )
        if image_size < PATCH or image_size % PATCH:
            raise ValueError(f"image_size is {image_size}, but must be a multiple of {PATCH}, the size of a patch")
        self.patches = nn.Conv2d(in_channels, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((image_size // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        features = self.norm(self.blocks(patches + self.positions))
        logits: Tensor = self.head(features.mean(1))
        return logits


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each behind a LayerNorm and beside a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.attention_norm(x))
        down: Tensor = self.down(F.gelu(self.hidden(self.mlp_norm(x))))
        return x + down

    def _attention(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        features = self.queries_keys_values(x).reshape(n, length, 3, self.heads, width // self.heads)
        queries, keys, values = features.permute(2, 0, 3, 1, 4)
        weights = (queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5).softmax(-1)
        attended: Tensor = self.output((weights @ values).transpose(1, 2).reshape(n, length, width))
        return attended
