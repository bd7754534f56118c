"""The base class of the averages: which steps it averages, and what can be done with it."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from steppe._checks import check_count
from steppe._engine.completed_steps import CompletedSteps, require_completed_step, with_hooks
from steppe._engine.eager import eager
from steppe._engine.whole_module import whole_module
from steppe.averaging._applied import Applied
from steppe.averaging._pairs import Pairs, copy_of
from steppe.averaging._statistics import batch_norms, refresh_statistics


class Average(AveragedModel):
    """An average of a model's weights, updated after each completed step of an optimizer.

    The base class of :class:`EMA`, :class:`SWA` and :class:`LastPart`, which say how to average. ``module`` is a copy
    of the model with the averaged weights; it has no part in training. Before the first averaged step it follows w.

    - **Which steps.** Steps of the optimizer: with gradient accumulation one for all micro-batches, with SAM one for
      all passes. A step that raised, or was skipped because its gradient was not finite, is none. (On an accelerator,
      SAM and fused optimizers skip it without telling the host: then the unchanged w counts once more.)
    - **Precision.** The average is in float32 where the weights have a half precision, because the small changes of an
      average would be lost in rounding. Weights in float32 and float64 keep their type.
    - **Buffers.** ``running_mean`` and ``running_var`` of normalization layers are averaged like weights; all other
      buffers are copied from the model. The averaged statistics approximate those of the averaged weights;
      :meth:`refresh_statistics` computes them.
    - **Memory.** A second copy of the model, and one more within :meth:`applied`.
    - **Checkpoints.** ``averaged.state_dict()`` beside those of the model and the optimizer resumes to the same bits.
    - **Wrapped models.** Of ``DistributedDataParallel`` and ``torch.compile`` the module inside is averaged. All ranks
      have the same average without communication. An FSDP2 model cannot be copied: pass a second one as ``module``.

    Args:
        model: The model to average.
        optimizer: The optimizer whose steps are averaged. None if you call :meth:`update_parameters` yourself.
        start: The number of steps before the first one that is averaged.
        every: Average each ``every``-th step after ``start``.
        device: The device of the average; by default the model's. ``"cpu"`` saves memory of the accelerator, and each
            update then waits for it.
        module: A module for the average, of the model's form; it is overwritten and keeps its precision. By default a
            deep copy of the model.

    Raises:
        TypeError: The optimizer runs no step hooks, or is the base of a SAM; or a model of FSDP1.
        ValueError: ``start`` or ``every`` out of range; a model that cannot be copied, or an optimizer of another one.
        RuntimeError: A step of the optimizer is pending, so that the weights may be perturbed; or the model has the
            weights of another average, within its :meth:`applied`.
    """

    n_steps: Tensor
    frozen: Tensor | None
    """For each BatchNorm layer: is it in evaluation mode in training? None without such layers."""
    _live: nn.Module
    _optimizer: Optimizer | None
    _steps: CompletedSteps | None
    _refusal: RemovableHandle | None

    @torch.inference_mode(mode=False)  # tensors made in inference mode could not be updated outside of it
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        start: int = 0,
        every: int = 1,
        device: torch.device | str | int | None = None,
        module: nn.Module | None = None,
    ) -> None:
        check_count("start", start, "the number of steps before the first that is averaged", at_least=0)
        check_count("every", every, "the number of steps from one that is averaged to the next")
        optimizer = None if optimizer is None else with_hooks(optimizer)
        require_completed_step(optimizer, type(self).__name__)
        live = whole_module(model)
        _refuse_if_applied_to(live, type(self).__name__)
        super().__init__(nn.Identity())
        self.module = copy_of(live, device) if module is None else whole_module(module)
        self.use_buffers = True
        self.start, self.every = start, every
        self.register_buffer("n_steps", torch.tensor(0, dtype=torch.long, device="cpu"))
        self.n_averaged = self.n_averaged.cpu()
        norms = batch_norms(live)
        self.register_buffer("frozen", torch.zeros(len(norms), dtype=torch.bool, device="cpu") if norms else None)
        # not as attributes: a module in one would be a part of this module
        self.__dict__.update(_live=live, _optimizer=optimizer, _refusal=None)
        self._pairs().copy()
        self._check_optimizer()
        self._note_frozen_layers()
        self._follow()

    @abstractmethod
    def _average_function(self) -> Callable[..., None]:
        """Return the function of ``torch.optim.swa_utils`` that adds the current weights to the average."""

    def _follow(self) -> None:
        """Update the average after each completed step of the optimizer from now on."""
        optimizer = self._optimizer
        self.__dict__["_steps"] = None if optimizer is None else CompletedSteps(optimizer, self._after_step)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_steps"}
        return {**state, "_refusal": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._follow()  # copies of optimizers have no hooks

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the average; its counters stay on the CPU, where reading them does not synchronize."""
        counters = self.n_averaged, self.n_steps, self.frozen
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.n_averaged, self.n_steps, self.frozen = counters
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a checkpoint, also one from before it said which layers are frozen: then those of the model are."""
        if self.frozen is not None:
            state_dict.setdefault(f"{prefix}frozen", self.frozen)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def is_applied(self) -> bool:
        """True within :meth:`applied`."""
        return self in _APPLIED

    def _check_optimizer(self) -> None:
        """Raise ValueError if the optimizer has no parameter of the model."""
        if self._optimizer is None:
            return
        stepped = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if stepped.isdisjoint(map(id, self._live.parameters())):
            raise ValueError(
                f"the optimizer of this {type(self).__name__} has no parameter of its model, so the average would be "
                "of weights that its steps never move: pass the optimizer of this model, made from its "
                "model.parameters(). If it steps copies of them, pass none, and call update_parameters() after each "
                "step"
            )

    def _pairs(self, model: nn.Module | None = None) -> Pairs:
        return Pairs(self.module, self._live if model is None else whole_module(model))

    @torch.inference_mode(mode=False)
    def _note_frozen_layers(self, *, in_training: bool = False) -> None:
        """Note which BatchNorm layers are in evaluation mode in training; in an evaluation, all modules are."""
        if self.frozen is not None and (in_training or any(m.training for m in self._live.modules())):
            self.frozen = torch.tensor([not layer.training for layer in batch_norms(self._live).values()])

    def _after_step(self) -> None:
        self.n_steps += 1
        steps = int(self.n_steps) - self.start
        if steps > 0 and steps % self.every == 0:
            self._update()
            self._note_frozen_layers(in_training=True)  # also of a model that is trained in evaluation mode
        elif self.n_averaged == 0:
            self._pairs().copy()

    @eager
    @torch.no_grad()
    def update_parameters(self, model: nn.Module | None = None) -> None:
        """Add the current weights to the average. With an optimizer this is called for you.

        Args:
            model: Another model of the same form; by default that of the constructor.

        Raises:
            RuntimeError: Called in the middle of a step of SAM, or within :meth:`applied` of any average of the model.
            ValueError: The model has other parameters than it had when the average was made.
        """
        self._update(model)
        self._note_frozen_layers()

    def _update(self, model: nn.Module | None = None) -> None:
        require_completed_step(self._optimizer, "update_parameters()")
        self._refuse_if_applied("update_parameters()")
        _refuse_if_applied_to(self._live if model is None else whole_module(model), "update_parameters()")
        pairs = self._pairs(model)
        if self.n_averaged == 0:
            pairs.copy()
        else:
            pairs.average(self._average_function(), int(self.n_averaged))
        self.n_averaged += 1

    def applied(self) -> AbstractContextManager[nn.Module]:
        """Give the model the averaged weights and buffers in a ``with`` block, and restore its own to the same bits.

        For an evaluation of the model itself, in its own precision and on its own devices. The optimizer must not step
        in the block. The mode of the model is yours: call ``model.eval()``.

        Returns:
            A context manager, whose value is the model.

        Raises:
            RuntimeError: Called in the middle of a step of SAM, or in another such block; or (from the optimizer) a
                step in the block.

        Example:
            >>> from steppe.averaging import SWA
            >>> model = torch.nn.Linear(2, 1)
            >>> averaged = SWA(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> with averaged.applied():
            ...     weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        """
        require_completed_step(self._optimizer, "applied()")
        self._refuse_if_applied("applied()")
        return Applied(self._live, self._pairs(), self._begin_applied, self._end_applied)

    def _begin_applied(self) -> None:
        """Refuse steps and updates until :meth:`_end_applied`."""
        _APPLIED.add(self)
        if self._optimizer is not None:
            self._refusal = self._optimizer.register_step_pre_hook(self._refuse_step)

    def _end_applied(self) -> None:
        _APPLIED.discard(self)
        if self._refusal is not None:
            self._refusal.remove()

    def _refuse_if_applied(self, caller: str) -> None:
        if self.is_applied:
            raise RuntimeError(_REFUSAL.format(caller))

    def _refuse_step(self, *_: Any) -> None:
        self._refuse_if_applied("step()")

    def refresh_statistics(
        self, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
    ) -> None:
        """Compute the statistics of BatchNorm layers for the averaged weights, by ``swa_utils.update_bn``.

        Call it before an evaluation, with a few dozen batches of the training data. The model and the random generators
        do not change. Batches are weighted by their samples. BatchNorm layers that were in evaluation mode in training
        keep their statistics. With several ranks, give all of them the same batches.

        Args:
            batches: The batches, such as a data loader.
            forward: Called as ``forward(module, batch)`` for each batch; by default ``module(batch)``, or
                ``module(batch[0])`` if the batch is a tuple or a list, on the device of the average.

        Raises:
            TypeError: A batch that is no tensor, without ``forward``.
            ValueError: There is no batch, or a batch of one sample.
            RuntimeError: Called within :meth:`applied`, whose model would keep the statistics that it has.

        Example:
            >>> from steppe.averaging import SWA
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
            >>> averaged = SWA(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> averaged.refresh_statistics([{"x": torch.ones(4, 2)}], lambda module, batch: module(batch["x"]))
        """
        if self.is_applied:
            raise RuntimeError(
                "refresh_statistics() was called within applied(): it computes the statistics of the average, and the "
                "model in the block has those from before. Call it before the block"
            )
        frozen = [] if self.frozen is None else self.frozen.tolist()
        names = [name for name, is_frozen in zip(batch_norms(self.module), frozen, strict=True) if is_frozen]
        refresh_statistics(self.module, batches, forward, names)


_REFUSAL = (
    "{} was called within applied(): the model has the averaged weights there, and its own are restored at the end of "
    "the block. Leave the block first"
)

_APPLIED: WeakSet[Average] = WeakSet()
"""The averages that are within :meth:`Average.applied`."""


def _refuse_if_applied_to(model: nn.Module, caller: str) -> None:
    """Raise RuntimeError if any of the model's weights are those of an average at the moment."""
    own = set(map(id, model.parameters()))
    if any(not own.isdisjoint(map(id, average._live.parameters())) for average in _APPLIED):
        raise RuntimeError(_REFUSAL.format(caller))
