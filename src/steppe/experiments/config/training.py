"""Sections of a recipe that say how a run is trained: the optimizer and the hardware."""

from dataclasses import dataclass
from typing import Literal

from steppe.experiments.config.checks import at_least, positive
from steppe.experiments.config.methods import BASES


@dataclass(frozen=True)
class TrainingConfig:
    """The base optimizer, the radius and the batch size."""

    base: Literal["sgd", "adamw"] = "sgd"
    """The base optimizer, plain and inside SAM."""
    lr: float = 0.05
    """Learning rate, constant."""
    head_lr: float | None = None
    """Learning rate of the new head; by default that of the rest."""
    momentum: float | None = None
    """Momentum of SGD; by default 0, or 0.9 for all methods when one of them (msam) perturbs along it."""
    weight_decay: float = 0.0
    """Weight decay of the base optimizer."""
    rho: float = 0.05
    """Radius of SAM's neighborhood; a method takes its usual multiple of it, unless its spec gives a rho."""
    batch_size: int = 64
    """Maximum number of images per step, over all devices; the batches of an epoch differ in size by one at most."""

    def check(self) -> None:
        """Raise ValueError for a value that is out of range."""
        positive("lr", self.lr, "the learning rate")
        positive("head_lr", self.head_lr, "the head's learning rate")
        at_least(
            self,
            {
                "momentum": (0, "SGD's momentum"),
                "weight_decay": (0, "the base optimizer's weight decay"),
                "rho": (0, "the radius of SAM's neighborhood"),
                "batch_size": (1, "images in one optimizer step"),
            },
        )
        if self.momentum and not BASES[self.base].has_momentum:
            raise ValueError(f"momentum={self.momentum}: {self.base} has none that could be set; leave it at 0")


@dataclass(frozen=True)
class HardwareConfig:
    """The device and the precision."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto takes a GPU if there is one."""
    amp: bool | None = None
    """Compute in bfloat16 where it is safe (autocast); the weights stay float32. By default where the machine has
    instructions for it."""
    channels_last: bool = False
    """Keep images and convolutions in the channels-last layout: faster on most machines."""
    compile: bool = False
    """Compile the network with torch.compile. Runs that are resumed may then differ in the last bits."""
    cuda_graphs: bool | None = None
    """Capture training steps as CUDA graphs, where the method allows it; by default on a GPU."""
    threads: int | None = None
    """CPU threads of a run; by default 1. Results differ in the last bits with their number."""

    def check(self) -> None:
        """Raise ValueError for a value that is out of range."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads}: the number of CPU threads must be at least 1")
