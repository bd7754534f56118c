"""Sections of a recipe that say what is trained: the data and the network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steppe.experiments.config.checks import at_least
from steppe.experiments.config.methods import unknown
from steppe.experiments.data.datasets import DatasetName


@dataclass(frozen=True)
class DataConfig:
    """The images and their labels."""

    dataset: DatasetName = "sample"
    """fashion-mnist: the whole data set. sample: 3000 training and 3000 test images of it, included in Steppe. digits:
    scikit-learn's 1797 handwritten digits, one in three of them for testing (needs the finetune extra)."""
    shots: int | None = None
    """Training images per class, drawn by the run's seed; by default all."""
    label_noise: float = 0.0
    """Fraction of the training images that get a wrong label, drawn by the run's seed. Training loss, training
    accuracy and gap are measured on these labels; the test labels are unchanged."""
    data_dir: Path | None = None
    """Folder of the full Fashion-MNIST; else $STEPPE_DATA, the system's package, the user's cache, or a download."""

    def check(self) -> None:
        """Raise ValueError for a value that is out of range."""
        at_least(
            self,
            {
                "shots": (1, "training images of each class"),
                "label_noise": (0, "the fraction of training images with a wrong label"),
            },
        )
        if self.label_noise >= 1:
            raise ValueError(
                f"label_noise={self.label_noise}: a fraction of the training images, 0.2 for one in five, must be "
                "below 1"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The network and its initial weights."""

    width: int = 16
    """Width of the PreAct ResNet-18: channels of its first stage; the full network has 64."""
    stem_stride: int = 2
    """Stride of its first convolution: 1 as in the article, 2 for a quarter of the work."""
    norm: Literal["batch", "group"] = "batch"
    """Its normalization layers. Several processes on CPUs need group."""
    backbone: str = "none"
    """Initial weights. none: random. own: the same network, pretrained once on Fashion-MNIST and kept in the user's
    cache. timm:NAME, hf:NAME or hf:FOLDER: a checkpoint. Its last layer is replaced by a new one."""
    pretrain_on: Literal["auto", "fashion-mnist", "sample"] = "auto"
    """Data that the own backbone is pretrained on; auto: the whole Fashion-MNIST if it is on this machine, else the
    sample."""
    pretrain_epochs: int = 3
    """Epochs of this pretraining, with SGD (lr 0.05, momentum 0.9, batch 128)."""
    freeze: bool = False
    """Train the new head only (a linear probe): weights and running statistics of the backbone are unchanged."""
    image_size: int | None = None
    """Height and width to which images are resized for a timm or hf checkpoint; by default those of its training."""

    def check(self) -> None:
        """Raise ValueError for a value that is out of range."""
        at_least(
            self,
            {
                "width": (1, "channels of the network's first stage"),
                "stem_stride": (1, "the stride of the network's first convolution"),
                "pretrain_epochs": (1, "the epochs that the backbone is pretrained for"),
                "image_size": (1, "height and width of the images that a checkpoint gets"),
            },
        )
        kind, colon, name = self.backbone.partition(":")
        if self.backbone not in ("none", "own") and not (colon and name and kind in ("timm", "hf")):
            raise ValueError(unknown("backbone", self.backbone, ("none", "own", "timm:NAME", "hf:NAME", "hf:FOLDER")))
        if self.image_size is not None and self.backbone in ("none", "own"):
            raise ValueError(
                f"image_size={self.image_size}: images are resized for timm and hf checkpoints only, and "
                f"backbone={self.backbone} takes them as they are: leave it out"
            )
