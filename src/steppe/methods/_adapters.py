"""Layers with a LoRA adapter of PEFT: their merged weights W = W0 + s B A, and their factors A and B.

PEFT is not imported: a model has layers of its classes only where it has been.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from steppe._tensors.dtensor import is_sharded

_SUPPORTED = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_MISSING = "model= is missing: this method acts on the LoRA adapters of its layers. Give the model of PEFT"
_NONE_FOUND = (
    "model= ({kind}) has no layer with a trained LoRA adapter, on which this method acts: give what "
    "peft.get_peft_model(model, LoraConfig(...)) returned, or use steppe.SAM"
)


def _kinds(*names: str, of: str = "lora.layer") -> Any:
    """Return classes of PEFT; none if it was not imported."""
    module = sys.modules.get(f"peft.tuners.{of}")
    return () if module is None else tuple(getattr(module, name) for name in names)


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer with one active LoRA adapter, which is trained."""

    name: str
    """The layer's name in the model."""
    module: Any
    """PEFT's layer, around the layer of the model."""
    adapter: str
    """The name of the adapter."""

    @property
    def base(self) -> nn.Module:
        """The layer of the model."""
        return cast(nn.Module, self.module.get_base_layer())

    @property
    def weight(self) -> Tensor:
        """W0, the frozen weight; no pass writes it."""
        return cast(Tensor, self.base.weight)

    @property
    def factors(self) -> list[Tensor]:
        """The parameters of the adapter, A and B."""
        found = [vars(self.module)["_modules"].get(name) for name in _FACTORS]
        found += [vars(self.module)["_parameters"].get(name) for name in _FACTORS]
        own = [each[self.adapter] for each in found if each is not None and self.adapter in each]
        return [p for one in own for p in ([one] if isinstance(one, Tensor) else one.parameters())]

    @property
    def is_applied(self) -> bool:
        """True if a forward adds the adapter now. The reference model of DPO, the same model, runs without it."""
        return not self.module.disable_adapters and self.adapter in self.module.active_adapters

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return W = W0 + s B A."""
        delta: Tensor = self.module.get_delta_weight(self.adapter)
        return self.weight + delta.to(self.weight.dtype)

    def dims_of_filter(self) -> list[int]:
        """Return the dimensions of the weight that belong to one filter: all but that of the outputs.

        Raises:
            ValueError: An embedding, which has no filters.
        """
        if isinstance(self.module, _kinds("Embedding")):
            raise ValueError(
                f"{self.name} is an embedding, and Flat-LoRA scales its noise by the filters of linear and convolution "
                "layers: leave it out of target_modules, or put it into modules_to_save"
            )
        return [0] if getattr(self.module, "fan_in_fan_out", False) else list(range(1, self.weight.dim()))


def adapted_layers(model: nn.Module | None) -> list[AdaptedLayer]:
    """Return the layers of a model whose LoRA adapter is trained.

    Raises:
        ValueError: There are none; or a merged weight is not W0 + s B A with a W0 of which a pass may use another value
            (several active adapters, merged or disabled ones, DoRA, quantized weights, tied weights, ...).
    """
    if model is None:
        raise ValueError(_MISSING)
    layers: list[AdaptedLayer] = []
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(name)
        if (
            isinstance(module, _kinds("BaseTunerLayer", of="tuners_utils"))
            and (adapter := _active_adapter(name, module)) is not None
        ):
            layer = AdaptedLayer(name, module, adapter)
            if any(p.requires_grad for p in layer.factors):
                layers.append(layer)
    for layer in layers:
        _check_weight(layer, owners)
    if not layers:
        raise ValueError(_NONE_FOUND.format(kind=type(model).__name__))
    return layers


def _active_adapter(name: str, module: Any) -> str | None:
    """Return the active adapter of a layer; None if it has none."""
    if not isinstance(module, _kinds("LoraLayer")):
        if module.active_adapters and any(p.requires_grad for p in module.parameters()):
            raise _refused(name, f"has an adapter of another kind ({type(module).__name__})", "Use steppe.SAM for it")
        return None
    active: list[str] = [
        one for one in module.active_adapters if any(one in getattr(module, kind) for kind in _FACTORS)
    ]
    if not active:
        return None
    if module.merged:
        raise _refused(name, f"holds merged adapters ({', '.join(module.merged_adapters)})", "Call unmerge_adapter()")
    if module.disable_adapters:
        raise _refused(name, "has its adapters disabled", "Call enable_adapter_layers()")
    if len(active) > 1:
        raise _refused(name, f"has several active adapters ({', '.join(active)})", "Activate one by set_adapter()")
    if not isinstance(module, _kinds(*_SUPPORTED)):
        raise _refused(name, f"is a {type(module).__name__}", "Quantized layers and this kind take steppe.SAM")
    if active[0] in module.lora_variant:
        kind = type(module.lora_variant[active[0]]).__name__
        raise _refused(name, f"has a variant of LoRA ({kind}: DoRA or the like)", "Use plain LoRA, or steppe.SAM")
    return active[0]


def _check_weight(layer: AdaptedLayer, owners: dict[int, list[str]]) -> None:
    weight = layer.weight
    if is_sharded(weight):
        raise _refused(
            layer.name, "has a sharded base weight", "Train under DistributedDataParallel, or use steppe.SAM"
        )
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise _refused(
            layer.name,
            f"has a quantized base weight ({type(weight).__name__}, {weight.dtype})",
            "Load the base in a floating dtype, or use steppe.SAM",
        )
    if weight.requires_grad:
        raise _refused(layer.name, "has a base weight that is trained itself", "Freeze it, or use steppe.SAM")
    if len(owners[id(weight)]) > 1:
        names = ", ".join(owners[id(weight)])
        raise _refused(layer.name, f"shares its base weight with another layer ({names})", "Adapt neither, or untie")


def _refused(name: str, what: str, remedy: str) -> ValueError:
    return ValueError(f"{name} {what}, so that its weight is not W0 + s B A with a W0 that can be perturbed. {remedy}")


@dataclass(frozen=True)
class Factors:
    """The two factors of one adapter, whose product s B A the network uses."""

    name: str
    """The layer's name in the model, and that of the adapter."""
    A: Tensor
    """A, a parameter."""
    B: Tensor
    """B, a parameter."""


def trained_factors(model: nn.Module | None) -> list[Factors]:
    """Return the pairs of factors that are trained, in all LoRA layers of a model; of quantized ones and DoRA, too.

    Raises:
        ValueError: There are none, or a factor belongs to two pairs.
    """
    if model is None:
        raise ValueError(_MISSING)
    found = [pair for pair in _factors(model) if pair.A.requires_grad and pair.B.requires_grad]
    if not found:
        raise ValueError(_NONE_FOUND.format(kind=type(model).__name__))
    owners: dict[int, str] = {}
    for pair in found:
        for p in (pair.A, pair.B):
            if (other := owners.setdefault(id(p), pair.name)) != pair.name:
                raise ValueError(
                    f"{other} and {pair.name} share a factor, which cannot balance both. Give each layer its own"
                )
    return found


def _factors(model: nn.Module) -> Iterator[Factors]:
    for name, module in model.named_modules():
        if not isinstance(module, _kinds("LoraLayer")) or hasattr(module, "lora_E"):  # AdaLoRA has a third factor
            continue
        for kind_A, kind_B in (_FACTORS[:2], _FACTORS[2:]):
            all_A, all_B = getattr(module, kind_A), getattr(module, kind_B)
            for adapter in all_A:
                if adapter in all_B:
                    yield Factors(f"{name}.{adapter}", _weight(all_A[adapter]), _weight(all_B[adapter]))


def _weight(factor: Any) -> Tensor:
    return factor if isinstance(factor, Tensor) else cast(Tensor, factor.weight)
