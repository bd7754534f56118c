"""Layers with a LoRA adapter: their merged weights W = W0 + s B A, the gradients of these, and passes at W + e."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from steppe._engine.eager import eager
from steppe._engine.rounding import add_scaled_stochastically_, is_half, surviving_share
from steppe._tensors.reductions import norm

try:
    from peft.tuners.lora import layer as lora
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as missing:
    raise ImportError(
        "steppe.integrations.peft needs PEFT, which is not installed: pip install 'steppe[peft]'"
    ) from missing

_SUPPORTED = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d)
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


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
        if isinstance(self.module, lora.Embedding):
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
        raise ValueError("model= is missing: the merged weights are those of its layers. Give the model of PEFT")
    layers: list[AdaptedLayer] = []
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(name)
        if isinstance(module, BaseTunerLayer) and (adapter := _active_adapter(name, module)) is not None:
            layer = AdaptedLayer(name, module, adapter)
            if any(p.requires_grad for p in layer.factors):
                layers.append(layer)
    for layer in layers:
        _check_weight(layer, owners)
    if not layers:
        raise ValueError(
            f"model= ({type(model).__name__}) has no layer with a trained LoRA adapter, so that there are no merged "
            "weights: give what peft.get_peft_model(model, LoraConfig(...)) returned, or use steppe.SAM"
        )
    return layers


def _active_adapter(name: str, module: Any) -> str | None:
    """Return the active adapter of a layer; None if it has none."""
    if not isinstance(module, lora.LoraLayer):
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
    if not isinstance(module, _SUPPORTED):
        raise _refused(name, f"is a {type(module).__name__}", "Quantized layers and this kind take steppe.SAM")
    if active[0] in module.lora_variant:
        kind = type(module.lora_variant[active[0]]).__name__
        raise _refused(name, f"has a variant of LoRA ({kind}: DoRA or the like)", "Use plain LoRA, or steppe.SAM")
    return active[0]


def _check_weight(layer: AdaptedLayer, owners: dict[int, list[str]]) -> None:
    weight = layer.weight
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise _refused(
            layer.name,
            f"has a quantized or sharded base weight ({type(weight).__name__}, {weight.dtype})",
            "Load the base in a floating dtype, or use steppe.SAM",
        )
    if weight.requires_grad:
        raise _refused(layer.name, "has a base weight that is trained itself", "Freeze it, or use steppe.SAM")
    if len(owners[id(weight)]) > 1:
        names = ", ".join(owners[id(weight)])
        raise _refused(layer.name, f"shares its base weight with another layer ({names})", "Adapt neither, or untie")


def _refused(name: str, what: str, remedy: str) -> ValueError:
    return ValueError(f"{name} {what}, so that its weight is not W0 + s B A with a W0 that can be perturbed. {remedy}")


@torch.no_grad()
def perturbed_weight(weight: Tensor, make: Callable[[], Tensor], rounding: int | None) -> Tensor:
    """Return W0 + e, the same in each call."""
    if rounding is None or not is_half(weight):
        return weight + make()
    perturbed = weight.detach().clone()
    add_scaled_stochastically_([perturbed], torch.ones(()), [make()], step=rounding)
    return perturbed


class MergedWeights:
    """The merged weights of a model within one step. W0 is never written: a pass at W + e uses W0 + e in its place.

    W0 + e is made in the forward of each layer, and again in its backward, so that one of them is in memory at a time.
    """

    def __init__(self) -> None:
        self.layers: list[AdaptedLayer] = []
        self.gradients: list[Tensor | None] = []
        """The gradient of each merged weight in the last pass that was recorded; None if it had no part in the loss."""
        self.perturbations: dict[int, Callable[[], Tensor]] = {}
        """By the position of its layer: a function that makes e."""
        self._rounding: int | None = None

    def __reduce__(self) -> tuple[type["MergedWeights"], tuple[()]]:
        return MergedWeights, ()  # it lasts for one step, and a copy of the optimizer begins with none

    def begin_step(self, model: nn.Module | None, *, rounding: int | None = None) -> None:
        """Find the layers, and forget the last step.

        Args:
            model: The model.
            rounding: The seed by which half-precision weights are rounded stochastically; None rounds to nearest.
        """
        self.end_step()
        self.layers, self._rounding = adapted_layers(model), rounding

    def end_step(self) -> None:
        """Forget the gradients and the perturbation."""
        self.gradients, self.perturbations = [], {}

    def at(self, i: int) -> Callable[[], Tensor] | None:
        """Return a function that makes W0 + e of a layer; None if it is not perturbed."""
        if i not in self.perturbations:
            return None
        rounding = None if self._rounding is None else self._rounding * len(self.layers) + i
        return partial(perturbed_weight, self.layers[i].weight, self.perturbations[i], rounding)

    @torch.no_grad()
    def surviving_share(self) -> float:
        """Return the share of e that survives rounding to half-precision weights; 1 if there are none."""
        moved = length = 0.0
        for i, make in self.perturbations.items():
            weight, perturbed = self.layers[i].weight, self.at(i)
            if is_half(weight) and perturbed is not None:
                e = make()
                square = float(norm([e])) ** 2
                moved += square * float(surviving_share([perturbed()], [weight], torch.ones(()), [e]))
                length += square
        return moved / length if length else 1.0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the gradients of the merged weights in the ``with`` block.

        That of W0 is that of W = W0 + s B A: both have the same inputs and outputs, the adapter's dropout aside.
        """
        weights = [layer.weight for layer in self.layers]
        try:
            for w in weights:
                w.requires_grad_(True)
            yield
            self.gradients = [w.grad for w in weights]
        finally:
            for w in weights:
                w.requires_grad_(False)
                w.grad = None

    @contextmanager
    def displaced(self) -> Iterator[None]:
        """Run the layers with W0 + e in the ``with`` block, as soon as :attr:`perturbations` has e."""
        ran: list[int] = []
        with ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.enter_context(_forward_replaced(layer.base, partial(self.at, i), ran))
            yield
        if self.perturbations and not ran:
            raise RuntimeError(
                "no layer with an adapter has run in the pass at w + e, so that nothing was perturbed: the pass runs "
                "another model than model=. Give the model that the passes run"
            )


@contextmanager
def _forward_replaced(
    base: nn.Module, make: Callable[[], Callable[[], Tensor] | None], ran: list[int]
) -> Iterator[None]:
    """Let the forward of a layer use another weight: what ``make()()`` returns; its own if ``make()`` returns None."""
    own, earlier = base.forward, vars(base).get("forward")

    @eager  # torch.compile knows neither the hooks of saved tensors nor a generator
    def forward(*args: Any, **kwargs: Any) -> Any:
        perturbed = make()
        if perturbed is None:
            return own(*args, **kwargs)
        ran.append(1)
        weight, base._parameters["weight"] = base._parameters["weight"], perturbed()  # type: ignore[assignment]
        try:
            with _made_again_in_backward(base.weight, perturbed):  # type: ignore[arg-type]
                return own(*args, **kwargs)
        finally:
            base._parameters["weight"] = weight

    base.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del base.forward
        else:
            base.forward = earlier


def _made_again_in_backward(tensor: Tensor, make: Callable[[], Tensor]) -> Any:
    """Return a context in which autograd does not keep a tensor or its views, but makes it again in the backward."""
    storage = tensor.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != storage:
            return saved
        return saved.size(), saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else make().as_strided(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
