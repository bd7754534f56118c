"""The mean loss of a model over data, as a function of its weights."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import chain, count
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steppe._checks import check_count
from steppe._tensors.batch_norm import mean_statistics, naming_batch
from steppe._tensors.dtensor import all_plain
from steppe._tensors.graph import derivatives, leaves
from steppe._tensors.reductions import accumulator
from steppe.flatness._batches import (
    Batches,
    Fingerprint,
    cast,
    is_tensors,
    join_rows,
    lengths,
    num_samples,
    num_targets,
    split_rows,
    whole_if_possible,
)
from steppe.flatness._forward import (
    BatchLoss,
    Evaluate,
    Evaluated,
    Loss,
    PlacedLoss,
    check_not_sharded,
    loss_of_batches,
    loss_of_outputs,
    select_parameters,
)
from steppe.flatness._isolation import seeded_generators
from steppe.flatness._kernels import twice_differentiable
from steppe.flatness._model_loss import LossTerms, evaluate_model_loss

_T = TypeVar("_T")
Progress: TypeAlias = Callable[[str, int], None]
"""(stage, passes over the data so far), called after each pass; an exception ends the measurement."""


class Objective:
    """The mean loss over data as a function of the weights, L(w) = 1/N sum_i l(w; x_i, y_i).

    The weights are one vector of ``n`` entries: all parameters with ``requires_grad``, in the order of
    ``named_parameters()``. The model is left unchanged: weights, buffers, ``.grad``, training modes, attributes and
    random generators, also those of its modules, Python and NumPy. Batches of different sizes are weighted by their
    samples, and one batch is in memory at a time.

    **Models that return their loss.** With neither ``loss`` nor ``evaluate``, batches are dictionaries, and the loss is
    that of ``model(**batch)``, as models of Hugging Face return it for batches with ``labels``. Batches are weighted by
    what this loss averages over, :attr:`weighted_by`: the samples or, for labels of tokens, those that are not -100,
    for a causal language model without the first of each row. So the objective is the loss over all data in one batch;
    the first pass checks this for one batch and its halves.

    **BatchNorm.** By default every module is in evaluation mode, so BatchNorm normalizes with its running statistics:
    this is the function that is used after training, the loss of a sample does not depend on other samples, and no
    result depends on ``batch_size``. ``batch_norm="train"`` normalizes with the statistics of each batch, as in
    training: another function with another Hessian, which depends on ``batch_size``. Dropout is off in both modes.

    Args:
        model: Any module. In ``DistributedDataParallel`` the loss is the mean over the data of all ranks: each rank
            passes its share, all make the same calls, and all get the same numbers.
        data: A pair of tensors (inputs, targets) or a dictionary of tensors, which is split into batches; or an
            iterable that yields the same batches each time (a list, a ``DataLoader``), in any order.
        loss: (outputs, targets) -> mean loss, a 0-dim tensor; a batch is then ``(*inputs, targets)``.
        evaluate: In place of ``loss``, (model, batch) -> mean loss, for batches of any form; or -> (mean loss, outputs)
            with all outputs that the loss is computed from, for the Gauss-Newton and Fisher matrices.
        batch_size: Samples per batch, if ``data`` is a pair or a dictionary of tensors; a single last sample joins the
            batch before it.
        batch_norm: "eval" or "train".
        parameters: Names of the parameters that form w; by default all that require a gradient.
        size: Batch -> number of samples that its loss averages over, or the sum of their weights; by default the
            length of the targets of ``loss``, else of the first tensor, or as above for a model that returns its loss.
            A ``loss`` that is a mean over the tokens that are not padding needs it, and one with class weights:
            ``lambda batch: weight[batch[1]].sum()``. Without it, a loss that is no mean over the samples gives a
            warning where it is averaged over several batches, parts or samples.
        dtype: Floating dtype of the computation; by default that of the weights, float32 for half-precision weights. An
            autocast region around a measurement has no effect on it; one within the model or the loss does.
        seed: Seed of the model's own random draws, which are the same in every pass.
        progress: (stage, passes) -> None, called after each pass over the data.

    Raises:
        TypeError: A model of which a part is sharded, complex parameters, or ``data`` is an iterator or a data set of
            single samples.
        ValueError: No parameters or an unknown name; both ``loss`` and ``evaluate``, or neither for a pair of tensors.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
        >>> objective.loss()
        tensor(2.5000, dtype=torch.float64)
        >>> objective.loss(torch.tensor([0.0, -1.0]))
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: Loss | None = None,
        evaluate: Evaluate | None = None,
        batch_size: int = 256,
        batch_norm: Literal["eval", "train"] = "eval",
        parameters: Sequence[str] | None = None,
        size: Callable[[Any], float] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        if batch_norm not in ("eval", "train"):
            raise ValueError(f"batch_norm={batch_norm!r}: choose 'eval' (running statistics) or 'train' (the batch's)")
        check_not_sharded(model)
        inner = getattr(model, "_orig_mod", None)  # a private name, torch.compile's
        model = inner if isinstance(inner, DistributedDataParallel) else model
        self.group = model.process_group if isinstance(model, DistributedDataParallel) else None
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.batch_norm, self.seed = batch_norm, seed
        self.stage = ""
        """Name of the current measurement, an argument of ``progress``."""
        self.passes = 0
        """Passes over the data so far."""
        self._progress = progress
        self._size = size
        self._unchecked_mean = size is None and batch_norm == "eval" and (loss is not None or evaluate is not None)
        self._batch_loss = BatchLoss(self.model, self._choose_loss(data, loss, evaluate))
        self._has_targets, self._unchecked_lengths = loss is not None, evaluate is not None
        self._batches = Batches(data, batch_size, self._size or (num_targets if self._has_targets else None))
        self._fingerprint: Fingerprint | None = None
        self._own_names: dict[int, str] = {}
        self._checked_leaves: list[bool] = []  # shared by all copies of this objective; filled by the check
        self._dtype = dtype
        self._set_parameters(parameters)

    def _choose_loss(
        self, data: Any, loss: Loss | None, evaluate: Evaluate | None
    ) -> Callable[[nn.Module, Any], Evaluated]:
        """Return the loss that was passed, or else that of the model, with the number of its terms as sizes."""
        both, neither = loss is not None and evaluate is not None, loss is None and evaluate is None
        if both or (neither and isinstance(data, tuple) and is_tensors(data)):
            raise ValueError(
                "an objective needs exactly one of two: loss=, (outputs, targets) -> mean loss, or evaluate=, (model, "
                "batch) -> mean loss. It needs neither only if the batches are dictionaries and model(**batch) returns "
                "its loss"
            )
        if loss is not None:
            return loss_of_outputs(loss)
        if evaluate is not None:
            return loss_of_batches(evaluate)
        self._size = self._size or LossTerms(self._loss_of_batch, check=self.batch_norm == "eval")
        return evaluate_model_loss

    def _set_parameters(self, names: Sequence[str] | None) -> None:
        selected = select_parameters(self.model, names)
        self._names, self._shapes = list(selected), [p.shape for p in selected.values()]
        self._other_weights: dict[str, Tensor] | None = None
        first, *others = (p.dtype for p in selected.values())
        widest = reduce(torch.promote_types, others, first)
        self.dtype = self._dtype or (widest if widest.itemsize > 2 else torch.float32)
        self.device = next(iter(selected.values())).device
        self._sizes = [p.numel() for p in selected.values()]
        self.n = sum(self._sizes)

    @property
    def _parameters(self) -> dict[str, Tensor]:
        """The tensors that form w, by name: those of the model now, which ``load_state_dict(assign=True)`` replaces."""
        if self._other_weights is not None:
            return self._other_weights
        parameters = dict(self.model.named_parameters(remove_duplicate=False))  # TorchScript has no get_parameter()
        return {name: parameters[name] for name in self._names}

    def restrict_to(self, names: Sequence[str]) -> "Objective":
        """Return the same loss as a function of the named parameters only; the others are constants."""
        objective = copy.copy(self)
        objective._set_parameters(names)
        return objective

    @contextmanager
    def at_weights(self, weights: Tensor) -> Iterator["Objective"]:
        """Yield the same loss with w replaced by other weights, (n,).

        The weights are used as they are: w + (w' - w) would differ from w' by rounding.
        """
        other = copy.copy(self)
        other._other_weights = dict(zip(self.names, self.unflatten(weights), strict=True))
        try:
            yield other
        finally:
            self.passes, self._fingerprint = other.passes, other._fingerprint

    def split(self, m: int) -> Iterator["Objective"]:
        """Yield the loss over each m samples of this rank as an objective of its own, in one pass.

        A part lies within one batch, whose last part may be smaller.

        Raises:
            ValueError: m is no whole number of at least 1, or a batch has not one row for each target.
        """
        check_count("m", m, "the number of samples of a part")
        for index, (batch, _) in enumerate(self._iterate_batches()):
            if m < num_samples(batch):
                self._check_rows(batch)
            if index == 0 and m < num_samples(batch):
                self.check_mean(batch)
            for part in split_rows(batch, m):
                if self.size(part) == 0:  # no token of these samples has a label
                    continue
                objective = copy.copy(self)
                objective.group, objective._fingerprint, objective._batches = None, None, self._batches.single(part)
                objective._unchecked_mean = False
                yield objective

    @property
    def names(self) -> list[str]:
        """Names of the parameters that form w."""
        return list(self._names)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shape of each parameter."""
        return list(self._shapes)

    @property
    def weights(self) -> Tensor:
        """The weights w, copied into a new tensor (n,)."""
        return self.flatten([p.detach() for p in self._parameters.values()])

    @property
    def state(self) -> list[Tensor]:
        """All that the loss depends on beside the data: w, and the model's other parameters and buffers, not copied."""
        weights = self._parameters
        named = chain(self.model.named_parameters(), self.model.named_buffers())
        return [*weights.values(), *(t for name, t in named if name not in weights)]

    @property
    def samples(self) -> float:
        """The number N of samples, or what else ``weighted_by`` names, on all ranks; an int if it is whole.

        Before the first pass, a pass over the data counts them.
        """
        if self._fingerprint is None:
            for _ in self._iterate_batches():
                pass
        assert self._fingerprint is not None
        own = torch.tensor(float(self._fingerprint.samples), dtype=torch.float64)
        return whole_if_possible(float(self.sum_over_ranks(own)))

    @property
    def rows(self) -> int:
        """The number of samples of this rank that :meth:`split` counts, whatever the loss averages over."""
        return sum(num_samples(batch) for batch, _ in self._iterate_batches())

    @property
    def weighted_by(self) -> str:
        """The unit of ``samples``, by which batches are weighted: "samples", "tokens", or "size(batch)"."""
        if isinstance(self._size, LossTerms):
            _ = self.samples  # the unit is known after a pass
            return self._size.unit
        return "samples" if self._size is None else "size(batch)"

    @property
    def is_single_batch(self) -> bool:
        """True if the data of this rank are known to be one batch, so that its graph can be kept."""
        return self._batches.number == 1

    @property
    def uses_running_statistics(self) -> bool:
        """True if the loss depends on running statistics of BatchNorm, which :meth:`statistics` can re-estimate."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return self.batch_norm == "eval" and any(m.running_mean is not None for m in norms)

    @property
    def world_size(self) -> int:
        """Number of processes that share the data."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy one tensor per parameter into a vector (n,); sparse gradients of embeddings become dense."""
        dense = (t.to_dense() if t.layout != torch.strided else t for t in tensors)
        return torch.cat([t.reshape(-1).to(self.device, self.dtype) for t in dense])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Split a vector (n,) into one view per parameter, of the parameter's shape.

        Raises:
            ValueError: A vector of another shape.
        """
        if vector.shape != (self.n,):
            raise ValueError(
                f"a vector of shape {tuple(vector.shape)} was given, but these weights have shape ({self.n},): "
                "make it with flatten(), from one tensor per parameter"
            )
        parts = torch.split(vector.to(self.device, self.dtype), self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def loss(self, e: Tensor | None = None, *, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return L(w + e), a 0-dim float64 tensor, in one pass.

        Args:
            e: The perturbation, (n,); None is 0.
            buffers: By name, in place of the model's, such as the result of :meth:`statistics`.
        """

        @torch.no_grad()
        def batch_loss(batch: Any) -> list[Tensor]:
            loss = self._placed(self._perturbed_weights(e), batch, buffers=buffers).run(lambda loss: loss())
            return [loss.to(accumulator(self.device))]

        return self.average(batch_loss)[0]

    def gradient(self, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return L(w + e), a 0-dim float64 tensor, and its gradient at w + e, (n,), in one pass."""

        def batch_gradient(batch: Any) -> list[Tensor]:
            weights = [w.requires_grad_() for w in self._perturbed_weights(e)]

            def differentiate(mean_loss: Callable[[], Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
                loss = mean_loss()
                return loss, self.gradient_of(loss, weights, batch)

            loss, gradients = self._placed(weights, batch).run(differentiate)
            return [loss.detach().to(accumulator(self.device)), self.flatten(gradients)]

        loss, gradient = self.average(batch_gradient)
        return loss, gradient

    def gradient_of(
        self, loss: Tensor, weights: Sequence[Tensor], batch: Any, *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the loss of a batch where the weights are placed; 0 for those that it does not use.

        Raises:
            ValueError: As of :meth:`check_leaves`.
        """
        self.check_leaves(loss, batch)
        if not loss.requires_grad:
            return tuple(map(torch.zeros_like, weights))
        return derivatives(loss, weights, create_graph=create_graph)

    def check_leaves(self, loss: Tensor, batch: Any) -> None:
        """Check once that the loss of a batch is a function of the weights that are placed in the model.

        Raises:
            ValueError: It depends on the model's own parameters, or on no parameter of the model at all.
        """
        if self._checked_leaves:
            return
        used = leaves(loss)
        if names := [name for i, name in self._own_names.items() if i in used]:
            raise ValueError(
                f"the loss uses {names[0]} of the model, taken from it before the measurement (a list of its "
                "parameters, a cached weight). The model runs on copies of its weights, of which this term would be no "
                "function: read the parameters in the loss itself, from model.parameters()"
            )
        if used.isdisjoint(map(id, self.model.parameters())) and not self._uses_any_parameter(batch):
            raise ValueError(
                "the loss depends on no parameter of the model, so that its derivatives would all be 0: it is computed "
                "under torch.no_grad(), from .item() or .detach(), or by another model than the one that is measured"
            )
        self._checked_leaves.append(True)

    def _uses_any_parameter(self, batch: Any) -> bool:
        """True if the loss of a batch depends on any parameter of the model, also on one that is no weight here."""
        named = {k: p for k, p in self.model.named_parameters() if p.is_floating_point() and all_plain([p])}
        weights = {k: p.detach().to(self.dtype, copy=True).requires_grad_() for k, p in named.items()}
        placed = self._batch_loss.place(weights, batch, self.dtype, train_norms=self.batch_norm == "train")
        used = placed.run(lambda loss: leaves(loss()))
        return not used.isdisjoint(map(id, weights.values()))

    def differentiable(self, batch: Any) -> tuple[list[Tensor], PlacedLoss]:
        """Return w as leaves that require gradients, and the mean loss of a batch as a function of them."""
        weights = [w.requires_grad_() for w in self._perturbed_weights(None)]
        return weights, self._placed(weights, batch)

    def size(self, batch: Any) -> float:
        """Return the number of samples of a batch, which its mean loss averages over."""
        return self._batches.size(batch)

    def average(self, function: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        """Average ``function(batch)``, a list of means over the batch, over the samples of all batches, in one pass.

        Raises:
            ValueError: No samples, or other samples than in the previous pass.
        """
        totals: list[Tensor] = []
        first: Any = None
        for index, (batch, size) in enumerate(self._iterate_batches()):
            if size == 0:  # the mean over no tokens is NaN
                continue
            if self._unchecked_mean and first is None:
                first = batch
            elif self._unchecked_mean:
                self.check_mean(first, batch)
            with self._pass_context(index), naming_batch(index):
                parts = [part.mul_(size) for part in function(batch)]
            totals = [t.add_(p) for t, p in zip(totals, parts, strict=True)] if totals else parts
        samples = self.samples
        if samples == 0:
            raise ValueError("data: there are no samples, but a mean loss needs at least one")
        return [self.sum_over_ranks(t) / samples for t in totals]

    def statistics(self, e: Tensor | None = None) -> dict[str, Tensor]:
        """Estimate BatchNorm's running statistics at w + e as the mean of the batch statistics, in one pass.

        Batches are weighted by their samples.
        Between two trained models, the running statistics of neither are right, so a loss that uses them is wrong.
        The model's own are left as they are; ``Average.refresh_statistics`` of :mod:`steppe.averaging` replaces them.

        References:
            Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization,
            https://arxiv.org/abs/1803.05407.
        """
        norms = {k: m for k, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        own = [(k, b) for k, b in self.model.named_buffers() if k.rpartition(".")[0] in norms]
        with torch.inference_mode(mode=False):
            buffers = {k: cast(torch.full_like(b, k.endswith("running_var")), self.dtype) for k, b in own}

        @torch.no_grad()
        def update_statistics(batch: Any) -> list[Tensor]:
            options: dict[str, Any] = {"buffers": buffers, "train_norms": True, "update_buffers": True}
            self._placed(self._perturbed_weights(e), batch, **options).run(lambda loss: loss())
            return []

        with mean_statistics(norms.values()) as seen:
            self.average(update_statistics)
        return {k: self._mean_over_ranks(b, seen[norms[k.rpartition(".")[0]]]) for k, b in buffers.items()}

    def _mean_over_ranks(self, tensor: Tensor, weight: int) -> Tensor:
        """Return the mean of a tensor over all ranks, each of which has its weight."""
        if self.group is None:
            return tensor
        total = self.sum_over_ranks(torch.tensor(float(weight), dtype=torch.float64))
        mean = self.sum_over_ranks(tensor.double() * weight) / total
        return mean.to(tensor.dtype) if total > 0 else tensor

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on its own device."""
        if self.group is not None:
            home, tensor = tensor.device, tensor.to(self.device)
            dist.all_reduce(tensor, group=self.group)
            tensor = tensor.to(home)
        return tensor

    def gather(self, values: list[_T]) -> list[_T]:
        """Return the values of all ranks in one list."""
        if self.group is None:
            return values
        by_rank: list[list[_T]] = [[]] * self.world_size
        dist.all_gather_object(by_rank, values, group=self.group)
        return [value for rank in by_rank for value in rank]

    def _check_rows(self, batch: Any) -> None:
        """Raise ValueError if a batch (*inputs, targets) has no rows to split; warn of other batches without."""
        if self._has_targets and num_samples(batch) != num_targets(batch):
            raise ValueError(
                f"a batch has inputs of {num_samples(batch)} rows and {num_targets(batch)} targets, so a part of its "
                "samples cannot be cut out: give batches with a row for each sample (batch_first=True for recurrent "
                "layers), or batches of m samples each, and m"
            )
        self._warn_of_lengths(batch)

    def _warn_of_lengths(self, batch: Any) -> None:
        """Warn once if the first dimensions of the tensors of a batch differ, so that the samples are a guess."""
        if self._unchecked_lengths and len(lengths(batch)) > 1:
            self._unchecked_lengths = False
            listed = ", ".join(map(str, lengths(batch)))
            warnings.warn(
                f"the tensors of a batch have {listed} rows. Its samples are taken to be the {num_samples(batch)} rows "
                "of the first tensor, by which batches are weighted and split: if the loss is a mean over something "
                "else (graphs, sequences), the result is wrong. Pass size=, batch -> number of terms that the loss "
                "averages over",
                stacklevel=5,
            )

    def check_mean(self, *batches: Any) -> None:
        """Warn once if the loss is no mean over the samples, by both halves of a batch or a half of each of two."""
        if not self._unchecked_mean or not all(map(num_samples, batches)):
            return
        self._unchecked_mean = len(batches) == 1 and not self.is_single_batch  # two batches show more than one
        if self._has_targets and any(num_samples(batch) != num_targets(batch) for batch in batches):
            return  # no rows to compare
        self._warn_of_lengths(batches[0])
        halves = [list(split_rows(batch, -(-num_samples(batch) // 2))) for batch in batches]
        parts = halves[0] if len(batches) == 1 else [first for first, *_ in halves]
        together = join_rows(*parts) if len(parts) == 2 else None
        if together is None:
            return
        whole, with_other_draws = self._loss_of_batch(together), self._loss_of_batch(together, seed=1)
        if whole != with_other_draws:
            return  # the loss is random, and the parts have draws of their own
        of_parts = sum(self._loss_of_batch(part) * num_samples(part) for part in parts) / num_samples(together)
        if math.isfinite(whole) and not math.isclose(whole, of_parts, rel_tol=1e-3, abs_tol=1e-5):
            self._unchecked_mean = False
            warnings.warn(
                f"the loss is {whole:.6g} over two parts of the data together and {of_parts:.6g} over them apart, so "
                "it is no mean over the samples (class weights, ignored labels, a sum, a loss of the whole batch), and "
                "a mean over batches, parts or samples depends on how the data are split: give one that is, such as "
                "F.cross_entropy(..., reduction='none').mean(), or size=, batch -> number of terms that the loss "
                "averages over, or the sum of their weights (lambda batch: weight[batch[1]].sum() for class weights, "
                "lambda batch: 1 for a loss of the whole batch)",
                stacklevel=4,
            )

    def _loss_of_batch(self, batch: Any, *, seed: int = 0) -> float:
        """Return the mean loss of one batch at w."""
        batch = cast(batch, device=self.device)
        with self._pass_context(seed), torch.no_grad():
            return float(self._placed(self._perturbed_weights(None), batch).run(lambda loss: loss()))

    def _perturbed_weights(self, e: Tensor | None) -> list[Tensor]:
        """Return w + e, one new tensor per parameter, which a forward may write to."""
        weights = [p.detach() for p in self._parameters.values()]
        if e is None:
            return [w.to(self.dtype, copy=True) for w in weights]
        return [w.to(self.dtype) + part for w, part in zip(weights, self.unflatten(e), strict=True)]

    def _placed(
        self,
        weights: Sequence[Tensor],
        batch: Any,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        train_norms: bool = False,
        update_buffers: bool = False,
    ) -> PlacedLoss:
        named = dict(zip(self._names, weights, strict=True))
        if not self._checked_leaves:
            self._own_names = {id(p): name for name, p in self.model.named_parameters()}
        train_norms = train_norms or self.batch_norm == "train"
        options: dict[str, Any] = {"train_norms": train_norms, "update_buffers": update_buffers}
        return self._batch_loss.place(named, batch, self.dtype, buffers=buffers, **options)

    def _iterate_batches(self) -> Iterator[tuple[Any, float]]:
        """Yield each batch, on the device of the weights, with its size; count the pass and check its samples."""
        fingerprint, batches = Fingerprint(by_batch=self.batch_norm == "train"), None
        for index in count():
            with seeded_generators(self.device, self.seed + index):  # a DataLoader draws random numbers, too
                batches = iter(self._batches) if batches is None else batches
                following = next(batches, None)
            if following is None:
                break
            batch = cast(following[0], device=self.device)
            fingerprint.add(batch, following[1])
            yield batch, following[1]
        if self._fingerprint is not None:
            fingerprint.compare(self._fingerprint)
        self._fingerprint = fingerprint
        self.passes += 1
        if self._progress is not None:
            self._progress(self.stage, self.passes)

    @contextmanager
    def _pass_context(self, index: int) -> Iterator[None]:
        """Enable gradients and switch autocast off, whatever the caller's modes; seed generators and select kernels."""
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
            seeded_generators(self.device, self.seed + index),
            twice_differentiable(self.model),
        ):
            yield
