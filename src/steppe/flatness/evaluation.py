"""How a model is asked for its loss: with weights from outside, in evaluation mode, and left as it was."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from steppe._tensors.dtensor import is_sharded

Loss: TypeAlias = Callable[..., Tensor]
"""(outputs, targets) -> the mean loss of a batch, a 0-dim tensor."""
Evaluate: TypeAlias = Callable[[Any, Any], Tensor]
"""(model, batch) -> the mean loss of a batch, a 0-dim tensor."""

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class Evaluation(nn.Module):
    """The model with its loss as one module, so that ``evaluate`` sees the model itself."""

    def __init__(self, model: nn.Module, evaluate: Evaluate) -> None:
        super().__init__()
        self.model, self._evaluate = model, evaluate

    def forward(self, batch: Any) -> Tensor:
        """Return the batch's mean loss."""
        return self._evaluate(self.model, batch)


def evaluation(loss: Loss | None, evaluate: Evaluate | None) -> Evaluate:
    """Choose the one that was given, in the form (model, batch) -> mean loss."""
    if (loss is None) == (evaluate is None):
        raise ValueError(
            "an objective needs one of two: loss=, (outputs, targets) -> mean loss, or evaluate=, (model, batch) -> "
            "mean loss"
        )
    if loss is None:
        assert evaluate is not None
        return evaluate

    def of(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise TypeError(
                f"a batch is {type(batch).__name__}, and loss= takes (*inputs, targets): for others say evaluate=, "
                "(model, batch) -> mean loss"
            )
        *inputs, targets = batch
        return loss(model(*inputs), targets)

    return of


def chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the parameters that are w, by name: ValueError or TypeError where they cannot be."""
    everything: dict[str, Tensor] = dict(model.named_parameters())
    if unknown := set(names or ()) - set(everything):
        raise ValueError(f"parameters: {', '.join(sorted(unknown))} is none of {type(model).__name__}'s parameters")
    found = {k: p for k, p in everything.items() if (p.requires_grad if names is None else k in set(names))}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient: name some with parameters="
        )
    for name, p in found.items():
        if is_sharded(p):
            raise TypeError(
                f"{name} is sharded, and flatness is measured on whole weights: gather them into a plain model "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict, full_state_dict=True)"
            )
        if p.is_complex() or not p.is_floating_point():
            raise TypeError(f"{name} is {p.dtype}, and a Hessian of real weights is measured here")
    return found


@contextmanager
def modes(model: nn.Module, *, norms: bool) -> Iterator[None]:
    """Be in evaluation mode, with the normalization layers in training mode if ``norms``."""
    before = {m: m.training for m in model.modules()}
    try:
        for m in before:
            m.training = norms and isinstance(m, _NORMS)
        yield
    finally:
        for m, training in before.items():
            m.training = training
