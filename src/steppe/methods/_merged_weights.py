"""Passes at merged weights W + e = W0 + s B A + e of LoRA, for merged_sam and flat_lora.

:class:`steppe.SAM` around the optimizer of a PEFT model perturbs A and B, and its radius is measured on them. The
network sees the product, in which e moves W by s (B e_A + e_B A + e_B e_A): B is 0 at first, so that the gradient of A
is zero and only B is perturbed; and W never moves out of the rows and columns of the two factors. Here, e moves W
itself, the update gradient is that of A and B at W + e, and nothing is ever written to W0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from steppe._engine.distributed import average_over_
from steppe._engine.eager import eager
from steppe._engine.rounding import MIN_SURVIVING_SHARE, add_scaled_stochastically_, is_half, surviving_share
from steppe.methods._adapters import AdaptedLayer, adapted_layers
from steppe.methods._base import OwnStepMethod
from steppe.rules import Perturbation, Point, needs_gradient
from steppe.rules.ops import norm, widen
from steppe.sam import Pass


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
        self._model: nn.Module | None = None

    def __reduce__(self) -> tuple[type["MergedWeights"], tuple[()]]:
        return MergedWeights, ()  # it lasts for one step, and a copy of the optimizer begins with none

    def begin_step(self, model: nn.Module | None, *, rounding: int | None = None) -> None:
        """Find the layers, and forget the last step.

        Args:
            model: The model.
            rounding: The seed by which half-precision weights are rounded stochastically; None rounds to nearest.
        """
        self.end_step()
        self.layers, self._rounding, self._model = adapted_layers(model), rounding, model

    def end_step(self) -> None:
        """Forget the gradients and the perturbation."""
        self.gradients, self.perturbations = [], {}

    def at(self, i: int) -> Callable[[], Tensor] | None:
        """Return a function that makes W0 + e of a layer; None if it is not perturbed."""
        if i not in self.perturbations:
            return None
        rounding = None if self._rounding is None else self._rounding * len(self.layers) + i
        return partial(perturbed_weight, self.layers[i].weight, self.perturbations[i], rounding)

    def _used(self, i: int) -> Callable[[], Tensor] | None:
        """Return what :meth:`at` does while the adapter is applied; a reference model without it stays at W0."""
        return self.at(i) if self.layers[i].is_applied else None

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
        """Record the gradients of the merged weights in the ``with`` block, averaged over the ranks that train them.

        That of W0 is that of W = W0 + s B A: both have the same inputs and outputs, the adapter's dropout aside.

        Raises:
            RuntimeError: There are several processes, and no ``DistributedDataParallel`` has run the layers.
        """
        weights = [layer.weight for layer in self.layers]
        with _Replicas(self._model, self.layers) as replicas, ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(_forward_cast(layer.base))
            try:
                for w in weights:
                    w.requires_grad_(True)
                yield
                self.gradients = replicas.averaged([w.grad for w in weights])
            finally:
                for w in weights:
                    w.requires_grad_(False)
                    w.grad = None

    @contextmanager
    def displaced(self) -> Iterator[None]:
        """Run the layers with W0 + e in the ``with`` block, as soon as :attr:`perturbations` has e.

        A forward without the adapter, as that of a reference model, is at W0.
        """
        ran: list[int] = []
        with ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.enter_context(_forward_replaced(layer.base, partial(self._used, i), ran))
            yield
        if self.perturbations and not ran:
            raise RuntimeError(
                "no layer with an adapter has run in the pass at w + e, so that nothing was perturbed: the pass runs "
                "another model than model=. Give the model that the passes run"
            )


def _forward_replaced(
    base: nn.Module, make: Callable[[], Callable[[], Tensor] | None], ran: list[int]
) -> AbstractContextManager[None]:
    """Let the forward of a layer use another weight: what ``make()()`` returns; its own if ``make()`` returns None."""

    def replace(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        perturbed = make()
        if perturbed is None:
            return own(*args, **kwargs)
        ran.append(1)
        dtype = _dtype_in_forward(base)

        def cast() -> Tensor:
            # as autocast does, whose own copy would be kept for the backward
            return perturbed().to(dtype)

        weight = cast()
        with _weight_replaced(base, weight), _made_again_in_backward(weight, cast):
            return own(*args, **kwargs)

    return _forward_wrapped(base, replace)


def _forward_cast(base: nn.Module) -> AbstractContextManager[None]:
    """Let the forward of a layer cast its weight as autocast does, which keeps its copy of a weight with a gradient."""

    def cast(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        weight: Any = base._parameters["weight"]
        with _weight_replaced(base, weight.to(_dtype_in_forward(base))):
            return own(*args, **kwargs)

    return _forward_wrapped(base, cast)


def _dtype_in_forward(base: nn.Module) -> torch.dtype:
    """Return the dtype in which the forward of a layer uses its weight: that of autocast, if it casts it."""
    weight: Any = base._parameters["weight"]
    is_cast = weight.dtype == torch.float32 and not isinstance(base, nn.Embedding)
    if is_cast and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    dtype: torch.dtype = weight.dtype
    return dtype


@contextmanager
def _weight_replaced(base: nn.Module, weight: Tensor) -> Iterator[None]:
    own, base._parameters["weight"] = base._parameters["weight"], weight  # type: ignore[assignment]
    try:
        yield
    finally:
        base._parameters["weight"] = own


@contextmanager
def _forward_wrapped(base: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Let the forward of a layer be ``run(forward, *args)`` in the ``with`` block."""
    own, earlier = base.forward, vars(base).get("forward")

    @eager  # torch.compile knows neither the hooks of saved tensors nor a generator
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(own, *args, **kwargs)

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


class _Replicas:
    """The ``DistributedDataParallel`` modules that run in a ``with`` block: those of the model, and those around it.

    They average the gradients of what is trained, and not those of W0, which is frozen when they are made.
    """

    def __init__(self, model: nn.Module | None, layers: Sequence[AdaptedLayer]) -> None:
        self._layers = layers
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._found: list[DistributedDataParallel] = []
        self._hooks: list[RemovableHandle] = []
        if model is not None and self._several:
            self._found += [m for m in model.modules() if isinstance(m, DistributedDataParallel)]

    def __enter__(self) -> "_Replicas":
        if self._several and not self._found:  # the model may be wrapped only after the optimizer was made
            self._hooks = [layer.module.register_forward_pre_hook(self._find) for layer in self._layers]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _find(self, *_: object) -> None:
        # A private name of torch, checked by tests: nothing else shows in which replica a layer runs.
        replica = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if replica is not None and not any(replica is found for found in self._found):
            self._found.append(replica)

    @torch.no_grad()
    def averaged(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the layers' weights, averaged in place over the ranks of their replicas."""
        if not self._several:
            return gradients
        owners = [{id(m) for m in replica.modules()} for replica in self._found]
        for replica, owned in zip(self._found, owners, strict=True):
            positions = [i for i, layer in enumerate(self._layers) if id(layer.module) in owned]
            self._average_(gradients, positions, replica.process_group)
        if left := [layer.name for layer in self._layers if not any(id(layer.module) in owned for owned in owners)]:
            raise RuntimeError(
                f"several processes, and no DistributedDataParallel has run {left[0]}: each rank would have a "
                "perturbation of its own, and the replicas would drift apart. Run the passes through "
                "DistributedDataParallel; if the model was compiled, give that module as model="
            )
        return gradients

    def _average_(self, gradients: list[Tensor | None], positions: Sequence[int], group: "dist.ProcessGroup") -> None:
        if not positions:
            return
        device = self._layers[positions[0]].weight.device
        has = torch.tensor([gradients[i] is not None for i in positions], dtype=torch.int32, device=device)
        dist.all_reduce(has, dist.ReduceOp.MAX, group=group)  # a rank may leave a layer out
        for i, anywhere in zip(positions, has.tolist(), strict=True):
            if anywhere:
                G = gradients[i]
                gradients[i] = G = torch.zeros_like(self._layers[i].weight) if G is None else G
                average_over_([G], group)


class MergedPerturbation(Perturbation, Protocol):
    """A perturbation of merged weights: fills :attr:`MergedWeights.perturbations`, and perturbs other parameters."""

    @property
    def merged(self) -> MergedWeights:
        """The merged weights of the step."""

    def check_layer(self, layer: AdaptedLayer) -> None:
        """Raise ValueError for a layer that the perturbation does not fit."""


def radii_of(layers: Sequence[AdaptedLayer], point: Point) -> list[float | Tensor]:
    """Return the radius of the group that the factors of each layer are in; 0 if they are in none."""
    rho = dict(zip(map(id, point.parameters), point.rho, strict=True))
    return [next((rho[id(p)] for p in layer.factors if id(p) in rho), 0.0) for layer in layers]


class MergedWeightMethod(OwnStepMethod):
    """Runs the perturbed passes of a step at W + e; made by :func:`merged_sam` and :func:`flat_lora`.

    Args:
        *args: Positional arguments of :class:`steppe.SAM`.
        rule: :class:`~steppe.methods.merged_sam.MergedGradient` or :class:`~steppe.methods.flat_lora.MergedNoise`.
        **kwargs: Keyword arguments of :class:`steppe.SAM`, but for ``perturbation``.

    Raises:
        ValueError: ``model`` is missing, or has a layer of which the merged weight cannot be perturbed.
        RuntimeError: A parameter group with ``maximize``, for a perturbation along the gradient.
    """

    own_rules: ClassVar[tuple[str, ...]] = ("perturbation",)
    why_no_first_step: ClassVar[str] = "the merged weights have no .grad that first_step() could read"

    def __init__(self, *args: Any, rule: MergedPerturbation, **kwargs: Any) -> None:
        self.refuse_own_rules(kwargs)
        super().__init__(*args, perturbation=rule, **kwargs)
        self._begin_step(rule)
        rule.merged.end_step()

    @property
    def _rule(self) -> Any:
        rule: Perturbation = self.perturbation
        return rule

    def _begin_step(self, rule: MergedPerturbation) -> None:
        if needs_gradient(rule) and any(group.get("maximize", False) for group in self.param_groups):
            self.refuse("maximize=True", "the perturbation would lower the objective. Minimize the negative loss")
        rule.merged.begin_step(self.model, rounding=self.steps_taken if self.stochastic_rounding else None)
        for layer in rule.merged.layers:
            rule.check_layer(layer)

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield SAM's passes: the one at w with the gradients of the merged weights, the other one at W + e."""
        merged: MergedWeights = self._rule.merged
        self._begin_step(self._rule)
        for sam_pass in self.sam_passes(accumulate=accumulate):
            if sam_pass.is_perturbed:
                sam_pass.around(merged.displaced())
            elif not sam_pass.is_last:
                sam_pass.around(merged.recorded())
            yield sam_pass
            if sam_pass.is_perturbed:
                self._record(merged)
        merged.end_step()

    @torch.no_grad()
    def _record(self, merged: MergedWeights) -> None:
        """Record |e| and |W| for :meth:`steppe.SAM.report`, and warn once if much of e is lost by rounding."""
        if not self.is_measuring:
            return
        for i, layer in enumerate(merged.layers):
            if (perturbed := merged.at(i)) is not None:
                e = widen(perturbed()) - widen(layer.weight)
                self.record_displacement(layer.factors, e, layer.merged_weight())
        share = merged.surviving_share()
        if share < MIN_SURVIVING_SHARE and not self.stochastic_rounding:
            self.warn_once(
                "rounding of merged weights",
                f"only {share:.0%} of the perturbation survives rounding to half-precision base weights: the rest is "
                "smaller than their last bit, so that SAM acts with a smaller radius than rho. Give "
                "stochastic_rounding=True, which keeps all of it on average, or load the base in float32",
            )
