"""Evaluate a model's mean loss on a batch with weights and buffers passed as arguments."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from steppe._tensors.cached_weights import drop_cached_weights
from steppe._tensors.dtensor import all_plain, is_sharded, sharded_part
from steppe.flatness._batches import cast
from steppe.flatness._isolation import evaluation_mode, on_copies

Loss: TypeAlias = Callable[..., Tensor]
"""(outputs, targets) -> the mean loss of a batch, a 0-dim tensor."""
_T = TypeVar("_T")
Evaluate: TypeAlias = Callable[[Any, Any], Tensor | tuple[Tensor, Any]]
"""(model, batch) -> the mean loss of a batch, a 0-dim tensor; or a pair of it and the outputs it is computed from."""


class Evaluated(NamedTuple):
    """The mean loss of a batch, with the model's outputs where they are known."""

    loss: Tensor
    outputs: Any = None


class PlacedLoss:
    """The mean loss of one batch, with other weights and buffers in the model and in one set of modes.

    They are in place during :meth:`run` only. Derivatives have to be computed there, too: activation checkpointing runs
    parts of the forward again in the backward, and would find the model's own weights and modes after it.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        evaluate: Callable[[], Evaluated],
        *,
        train_norms: bool,
        cast_to: torch.dtype | None = None,
    ) -> None:
        self._model, self._state, self._evaluate, self._train_norms = model, state, evaluate, train_norms
        self._cast_to = cast_to

    def run(self, function: Callable[[Callable[[], Tensor]], _T]) -> _T:
        """Return ``function(loss)`` with the weights in place; ``loss()`` is the mean loss of the batch."""
        return self._run(partial(function, lambda: self._checked().loss))

    def run_evaluated(self, function: Callable[[Evaluated], _T]) -> _T:
        """Return ``function(evaluated)`` with the weights in place, for the loss with the model's outputs."""
        return self._run(lambda: function(self._checked()))

    def _run(self, function: Callable[[], _T]) -> _T:
        drop_cached_weights()  # parametrize.cached() goes by the module, so it would return those of other weights
        try:
            with on_copies(self._model, self._state), evaluation_mode(self._model, train_norms=self._train_norms):
                return function()
        finally:
            drop_cached_weights()

    def _checked(self) -> Evaluated:
        try:
            evaluated = self._evaluate()
        except RuntimeError as error:
            if self._cast_to is None or not any(part in str(error) for part in ("dtype", "scalar type")):
                raise
            raise RuntimeError(
                f"{error}. Parameters, buffers and batches are converted to {self._cast_to}, in which this objective "
                "computes (dtype=), but not the other tensors that loss=, evaluate= or the model hold (the weight of a "
                "CrossEntropyLoss, a constant): convert these, too, or convert the whole model and leave out dtype="
            ) from error
        loss = evaluated.loss
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss of a batch is {got}, but it must be the mean loss, a 0-dim tensor")
        return evaluated


class BatchLoss:
    """The mean loss of one batch as a function of weights and buffers. The model keeps its own ones and its modes."""

    def __init__(self, model: nn.Module, evaluate: Callable[[nn.Module, Any], Evaluated]) -> None:
        self._model, self._evaluate = model, evaluate

    def place(
        self,
        weights: Mapping[str, Tensor],
        batch: Any,
        dtype: torch.dtype,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        train_norms: bool = False,
        update_buffers: bool = False,
    ) -> PlacedLoss:
        """Return the mean loss of a batch, computed in ``dtype``.

        Args:
            weights: Parameters by name, in place of the model's. A forward may write to them.
            batch: In the form that ``evaluate`` takes.
            dtype: Floating dtype of the whole computation.
            buffers: By name, in place of the model's.
            train_norms: Normalize by the statistics of the batch.
            update_buffers: Write new running statistics into ``buffers``, not into copies of them.
        """
        buffers, model = buffers or {}, self._model
        own = {k: p for k, p in model.named_parameters() if k not in weights}
        is_cast = any(p.dtype != dtype for p in model.parameters())
        to = dtype if is_cast else None
        # parameters with operations of their own (quantized ones) may have no copies
        state = {k: _copied(p.detach(), to) for k, p in own.items() if all_plain([p])}
        state |= {k: cast(p.detach(), dtype) for k, p in own.items() if is_cast and k not in state}
        state |= {k: _copied(buffers.get(k, b), to) for k, b in model.named_buffers()}
        state |= {k: cast(b, to) for k, b in buffers.items()} if update_buffers else {}
        state |= weights
        batch = cast(batch, to)
        return PlacedLoss(model, state, partial(self._evaluate, model, batch), train_norms=train_norms, cast_to=to)


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a copy of a tensor, which a forward may write to, cast to the dtype if it is of floating point."""
    copy = cast(tensor, dtype)
    return copy.clone() if copy is tensor else copy


def loss_of_outputs(loss: Loss) -> Callable[[nn.Module, Any], Evaluated]:
    """Return the loss as a function (model, batch), for batches (*inputs, targets)."""

    def evaluate_loss(model: nn.Module, batch: Any) -> Evaluated:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise TypeError(
                f"a batch is {type(batch).__name__}, but loss= needs (*inputs, targets): for other batches pass "
                "evaluate=, (model, batch) -> mean loss"
            )
        *inputs, targets = batch
        outputs = model(*inputs)
        return Evaluated(loss(outputs, targets), outputs)

    return evaluate_loss


def loss_of_batches(evaluate: Evaluate) -> Callable[[nn.Module, Any], Evaluated]:
    """Return the loss as a function (model, batch), with the outputs if ``evaluate`` returns them."""

    def evaluate_loss(model: nn.Module, batch: Any) -> Evaluated:
        result = evaluate(model, batch)
        return Evaluated(*result) if isinstance(result, tuple) and len(result) == 2 else Evaluated(result)

    return evaluate_loss


def check_not_sharded(network: nn.Module | Mapping[str, Tensor]) -> None:
    """Raise TypeError if a part of a model or state dict is sharded, also a frozen one, which the forward runs, too."""
    if isinstance(network, nn.Module):
        part = sharded_part(network)
    else:
        part = next((name for name, tensor in network.items() if is_sharded(tensor)), None)
    if part is not None:
        raise TypeError(
            f"{part} is sharded (FSDP, tensor parallelism), but flatness is measured on full tensors: gather them into "
            "a plain model (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )


def select_parameters(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the named parameters, by default all that require a gradient, in the model's order, by their first names.

    Raises:
        ValueError: An unknown name, or no parameters.
        TypeError: Complex or integer parameters.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False))
    if unknown := set(names or ()) - set(tied):
        raise ValueError(f"parameters: {type(model).__name__} has no parameter named {', '.join(sorted(unknown))}")
    named = {id(tied[name]) for name in names or ()}
    found = {k: p for k, p in parameters.items() if (p.requires_grad if names is None else id(p) in named)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient: name some with parameters="
        )
    for name, p in found.items():
        if p.is_complex() or not p.is_floating_point():
            raise TypeError(f"{name} is {p.dtype}, but the Hessian is that of real floating-point weights")
    return found
