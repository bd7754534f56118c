"""The loss that a model returns itself, as those of Hugging Face do, and the number of terms it averages over."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from steppe.flatness._batches import num_samples, split_rows
from steppe.flatness._forward import Evaluated

IGNORED = -100
"""The label of a token that the loss leaves out."""


def evaluate_model_loss(model: nn.Module, batch: Any) -> Evaluated:
    """Return the loss that ``model(**batch)`` returns, with the logits.

    Raises:
        TypeError: The batch is not a dictionary.
        ValueError: The model returned no loss.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is {type(batch).__name__}, but without loss= and evaluate= the model is called as model(**batch) "
            "and must return its loss: pass batches that are dictionaries, or one of the two"
        )
    returned = model(**batch)
    fields = _fields(returned)
    loss = fields.get("loss")
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch of {', '.join(batch)}: models of Hugging Face need "
            "labels for it; for other models pass loss= or evaluate="
        )
    return Evaluated(loss, logits_in(returned))


def logits_in(returned: Any) -> dict[str, Any] | None:
    """Return the logits in what a model returned, by name; None if there are none."""
    found = {name: value for name, value in _fields(returned).items() if "logits" in name and value is not None}
    return found or None


def _fields(returned: Any) -> Mapping[str, Any]:
    if isinstance(returned, Mapping):
        return returned
    if isinstance(returned, tuple):  # return_dict=False
        return {"loss": returned[0], "logits": returned[1] if len(returned) > 1 else None}
    return {name: getattr(returned, name, None) for name in ("loss", "logits")}


class LossTerms:
    """The number of terms that a model's own loss averages over: the labels that count for tokens, else the samples.

    Integer labels of two dimensions or more are labels of tokens, of which those that are -100 do not count. A causal
    language model predicts each token from the ones before, so the first label of a row does not count either. This is
    found from the model itself, by its loss for the first labels alone.

    Args:
        loss: Batch -> the loss of the model, as a number.
        check: Compare the loss of one batch with those of its halves.
    """

    def __init__(self, loss: Callable[[Any], float], *, check: bool) -> None:
        self._loss = loss
        self._is_checked = not check
        self._is_causal: bool | None = None
        self.unit = "samples"

    def __call__(self, batch: Any) -> float:
        """Return the number of terms of a batch.

        Raises:
            ValueError: The loss of a batch is not the mean of the losses of its parts.
        """
        terms = self._count(batch)
        if not self._is_checked:
            self._check(batch, terms)
        return terms

    def _count(self, batch: Any) -> int:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
            return num_samples(batch)
        self.unit = "tokens"
        counted = labels != IGNORED
        if self._is_causal is None and bool(counted[:, 0].any()):
            alone = labels.clone()
            alone[:, 1:] = IGNORED
            of_first = self._loss({**batch, "labels": alone})
            self._is_causal = math.isnan(of_first) or of_first == 0.0
        return int((counted[:, 1:] if self._is_causal else counted).sum())

    def _check(self, batch: Any, terms: int) -> None:
        """Raise ValueError unless the loss of a batch is the weighted mean of those of its halves."""
        parts = [(part, self._count(part)) for part in split_rows(batch, max(1, num_samples(batch) // 2))]
        parts = [(part, n) for part, n in parts if n > 0]
        if len(parts) < 2:
            return
        whole, of_parts = self._loss(batch), sum(self._loss(part) * n for part, n in parts) / terms
        # losses of Hugging Face are computed in float32, whatever the dtype of the weights
        if math.isfinite(whole) and not math.isclose(whole, of_parts, rel_tol=1e-4, abs_tol=1e-5):
            raise ValueError(
                f"the model's loss is {whole:.6g} over a batch and {of_parts:.6g} over its parts, so it is not a mean "
                f"over {self.unit}, and a mean over several batches would depend on how the data are split: pass "
                "size=, batch -> number of terms that the loss averages over, or evaluate=, without terms of the whole "
                "batch (auxiliary losses)"
            )
        self._is_checked = True
