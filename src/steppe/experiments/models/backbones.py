"""Backbones: pretrained networks that get a new head."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.experiments.data.datasets import MEAN, STD
from steppe.experiments.errors import ExperimentError, first_line

_NOT_ARCHITECTURE = frozenset(
    {"_commit_hash", "_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype"}
    | {"transformers_version"}
)
"""Entries of config.json on which the network without its head does not depend."""
_LARGEST = 4096
"""Pixels; a larger size is a mistake in a file, and would exhaust the memory."""
_FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network with pretrained weights, and the images that it was pretrained on."""

    model: nn.Module
    """Images to logits, as a tensor or as `.logits`."""
    head: str
    """The name of its last layer, which every run replaces by a new one."""
    source: str
    """A description of the checkpoint."""
    mean: Sequence[float] = (MEAN,)
    """Mean of each channel that its images were normalized with, of pixels scaled to [0, 1]."""
    std: Sequence[float] = (STD,)
    size: int | None = None
    """Height and width of its images; None: not resized."""
    config: str = ""
    """The checkpoint's own description of its network, as JSON, if it has one: activations and strides leave no trace
    in the weights."""

    def network(self, *, freeze: bool) -> FineTuned:
        return FineTuned(self, freeze)  # its head is drawn from torch's generator

    def digest(self) -> str:
        # without the head, which is replaced
        images = f"{self.head} {list(self.mean)} {list(self.std)} {self.size}\n"
        digest = hashlib.sha256(f"{images}{self.config}".encode())
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(f"{self.head}."):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class FineTuned(nn.Module):
    """A backbone's network on images (n, 1, h, w) from `datasets.normalize`.

    The images are resized to (size, size), expanded to the backbone's channels and normalized with its mean and
    standard deviation. A frozen backbone stays in evaluation mode, so its running statistics are unchanged too.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, backbone: Backbone, freeze: bool) -> None:
        super().__init__()
        self.body = copy.deepcopy(backbone.model)
        self.size, self._head, self._freeze = backbone.size, backbone.head, freeze
        self.head.reset_parameters()  # type: ignore[operator]
        own = tuple(backbone.mean) == (MEAN,) and tuple(backbone.std) == (STD,)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (backbone.mean, backbone.std))
        self.register_buffer("scale", None if own else STD / std, persistent=False)
        self.register_buffer("shift", None if own else (MEAN - mean) / std, persistent=False)
        for parameter in self.parameters():
            parameter.requires_grad_(not freeze)
        self.head.requires_grad_(True)
        self.train()

    @property
    def head(self) -> nn.Module:
        return self.body.get_submodule(self._head)

    def train(self, mode: bool = True) -> FineTuned:
        """Switch the mode; of a frozen backbone only that of the head."""
        super().train(mode)
        if self._freeze:
            self.body.eval()
            self.head.train(mode)
        return self

    def groups(self, head_lr: float | None) -> list[dict[str, Any]]:
        """Return the groups of trained parameters: the backbone, unless it is frozen, and the head with its own lr."""
        head = set(self.head.parameters())
        body = [p for p in self.parameters() if p.requires_grad and p not in head]
        last = {"params": list(self.head.parameters())} | ({} if head_lr is None else {"lr": head_lr})
        return [{"params": body}, last] if body else [last]

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift  # (n, 1, h, w) to (n, channels, h, w)
        out = self.body(images)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits


def from_hub(name: str, classes: int, image_size: int | None) -> Backbone:
    """Load `timm:NAME`, `hf:NAME` or `hf:FOLDER`, with a head for `classes` classes.

    Raises ExperimentError when the library, the checkpoint or a part of its metadata is missing or damaged, or when the
    network does not take the images.
    """
    kind, _, rest = name.partition(":")
    load, packages = {"timm": (_timm, "timm torchvision"), "hf": (_hugging_face, "'steppe[transformers]'")}[kind]
    try:
        backbone = load(rest, classes, image_size)
    except ModuleNotFoundError as error:
        raise ExperimentError(
            f"{error.name} is not installed, and --backbone {name} needs it: pip install {packages}"
        ) from error
    except ExperimentError:  # a RuntimeError that has its own message
        raise
    except Exception as error:  # the hubs raise many types on a damaged file
        remedy = (
            "a file in this folder is missing or damaged, or it is not one of save_pretrained(): copy it anew"
            if kind == "hf" and Path(rest).is_dir()
            else "check the name and the network connection; a folder of save_pretrained() works too, hf:FOLDER"
        )
        raise ExperimentError(f"the backbone {name} could not be loaded ({first_line(error)}): {remedy}") from error
    unusable = [key for key, t in backbone.model.state_dict().items() if not t.isfinite().all()]
    if unusable:
        raise ExperimentError(
            f"the weights of {name} are not finite ({', '.join(unusable[:3])}), and no training could start from them: "
            "the file is damaged; copy or download it anew"
        )
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = backbone.network(freeze=False).eval()(torch.zeros(2, 1, 28, 28))
    except Exception as error:  # the network's code is the checkpoint's
        raise ExperimentError(
            f"{name} does not take images of {backbone.size} x {backbone.size} pixels ({first_line(error)}): leave "
            "--image-size out, or take another checkpoint"
        ) from error
    if logits.shape != (2, classes):
        raise ExperimentError(
            f"{name} returns {tuple(logits.shape)} for two images and not (2, {classes}): it is no image classifier"
        )
    return backbone


def _timm(name: str, classes: int, image_size: int | None) -> Backbone:
    import timm  # type: ignore[import-not-found, import-untyped, unused-ignore]

    model = timm.create_model(name, pretrained=True, num_classes=classes)
    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment, unused-ignore]
    head = known.get("classifier")
    if not isinstance(head, str):
        raise ExperimentError(f"timm:{name} has no single last layer but {head!r}, so no new head can replace it")
    size = image_size or known["input_size"][-1]
    return Backbone(model, head, f"timm's {name}", known["mean"], known["std"], size)


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep transformers from reporting which weights of a checkpoint are left out or new."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call, unused-ignore]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _hugging_face(name: str, classes: int, image_size: int | None) -> Backbone:
    from transformers import AutoModelForImageClassification, ImageProcessingMixin, PretrainedConfig

    with without_reports():  # of the replaced head; missing weights are checked below
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
        written, _ = PretrainedConfig.get_config_dict(name)
        model, info = AutoModelForImageClassification.from_pretrained(
            name,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,  # else it would ask on the terminal, and then run code of the checkpoint
        )
    heads = [
        layer
        for layer, module in model.named_modules()
        if classes in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
        and hasattr(module, "reset_parameters")
    ]
    if not heads:
        raise ExperimentError(f"hf:{name} has no linear last layer for {classes} classes, so it cannot get a new head")
    head = heads[-1]
    missing = [key for key in info["missing_keys"] if not key.startswith(f"{head}.")]
    if missing:
        raise ExperimentError(
            f"the checkpoint hf:{name} lacks {len(missing)} of the network's weights ({', '.join(sorted(missing)[:3])}"
            "...), which would be random: name a checkpoint of an image classifier"
        )
    mean, std = _normalization(f"hf:{name}", processor)
    size = image_size or _size(processor) or getattr(model.config, "image_size", None)
    if not isinstance(size, int):
        raise ExperimentError(f"hf:{name} does not state the size of its images: give it with --image-size")
    if not 0 < size <= _LARGEST:
        raise ExperimentError(f"hf:{name} states {size} pixels as the size of its images: give it with --image-size")
    architecture = {key: value for key, value in written.items() if key not in _NOT_ARCHITECTURE}
    config = json.dumps(architecture, sort_keys=True)
    return Backbone(model, head, f"Hugging Face's {name}", mean, std, size, config)


def _normalization(name: str, processor: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    factor = processor.get("rescale_factor", 1 / 255)
    if not _is_number(factor):
        raise ExperimentError(f"{name}: rescale_factor in its preprocessor_config.json is {factor!r} and not a number")
    if not processor.get("do_rescale", True) or processor.get("rescale_offset") or abs(factor * 255 - 1) > 1e-3:
        raise ExperimentError(
            f"{name} needs pixels scaled by {factor:g} (do_rescale {processor.get('do_rescale', True)}, "
            f"rescale_offset {processor.get('rescale_offset', False)}), and only [0, 1] is supported: its images "
            "would be wrong. Take another checkpoint"
        )
    if not processor.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    if "image_mean" not in processor or "image_std" not in processor:
        raise ExperimentError(
            f"{name}: its preprocessor_config.json has no image_mean and image_std, so its images could not be "
            "normalized as they were in pretraining. Take another checkpoint, or add them to a local copy"
        )
    mean, std = processor["image_mean"], processor["image_std"]
    are_numbers = all(isinstance(v, list) and v and all(map(_is_number, v)) for v in (mean, std))
    if not are_numbers or len(mean) != len(std) or min(std) <= 0:
        raise ExperimentError(
            f"{name}: image_mean and image_std in its preprocessor_config.json must be a number for each channel, and "
            f"image_std positive; they are {mean!r} and {std!r}"
        )
    return mean, std


def _is_number(value: object) -> bool:
    """True for a number that a float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FLOAT_MAX


def _size(processor: Mapping[str, Any]) -> int | None:
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return size if isinstance(size, int) and not isinstance(size, bool) else None
