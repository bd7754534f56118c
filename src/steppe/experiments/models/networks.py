"""The networks of the built-in tasks by their names."""

from typing import Literal

from torch import nn

from steppe.experiments.models.preact_resnet import Norm, PreActResNet18
from steppe.experiments.models.vit import VisionTransformer

NetworkName = Literal["preact-resnet-18", "vit"]


def new_network(name: NetworkName, width: int, *, stem_stride: int, norm: Norm) -> nn.Module:
    """Return a network with new random weights; a vision transformer has neither a stride nor a choice of norms.

    >>> type(new_network("vit", 32, stem_stride=2, norm="batch")).__name__
    'VisionTransformer'
    """
    if name == "vit":
        return VisionTransformer(width)
    return PreActResNet18(width, stem_stride=stem_stride, norm=norm)
