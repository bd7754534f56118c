"""Hugging Face Trainer: a step runs all passes of SAM, and all else in the Trainer runs once a step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._engine.closure import InPlaceWrites
from steppe._engine.gradients import is_nonzero
from steppe._engine.report import Report
from steppe.integrations._batches import named_tensors
from steppe.integrations._method_options import MethodOptions, set_model_if_missing
from steppe.integrations._module_attributes import PlainAttributes
from steppe.integrations._pass_losses import MeanLosses, StepLosses
from steppe.sam import SAM, Pass

try:
    from accelerate.utils import is_compiled_module  # type: ignore[import-untyped]
    from transformers import Trainer

    from steppe.integrations._averaged_trainer import AveragedTrainerMixin
    from steppe.integrations.accelerate import check_supported, share_scaler, unprepared, unwrap_optimizer
except ImportError as missing:
    raise ImportError(
        "steppe.integrations.transformers needs Transformers and Accelerate, and one of them is not installed: "
        "pip install 'steppe[transformers]'"
    ) from missing

__all__ = ["AveragedTrainerMixin", "SAMTrainer", "SAMTrainerMixin"]

if TYPE_CHECKING:
    _Trainer = Trainer
else:  # at run time the Trainer is the class that follows in the method resolution order
    _Trainer = object

_GENERATES = (
    "_generate_and_score_completions",
    "_generate_vllm",
    "_generate_on_policy_for_slices",
    "_generate_student_completions",
    "generate_on_policy_outputs",
)
"""Methods of trainers (TRL's GRPO, RLOO, online DPO, GKD and their like) that generate inside ``training_step``."""


class SAMTrainerMixin(_Trainer):
    """Sharpness-aware minimization in any Trainer: put it first, ``class Mine(SAMTrainerMixin, Seq2SeqTrainer)``.

    A step runs all micro-batches of its accumulation window in each pass, when the last of them arrives. After the
    passes ``.grad`` is the update gradient, and the Trainer unscales, clips, logs and steps as usual. The logged
    ``loss`` is L(w), or L(w + e) for a method whose only pass is perturbed; ``grad_norm`` is the norm of the update
    gradient.

    ``compute_loss`` and ``training_step`` run once for each micro-batch *and pass*, so a counter of your own in them
    counts passes; :attr:`current_pass` distinguishes the passes. Callbacks, logs, token counts, schedulers and
    checkpoints see one step: plain attributes of the Trainer, with the metrics that it keeps (as TRL's SFT, DPO, KTO
    and reward trainers do), are restored after each further pass. Objects of other classes are not covered.

    The optimizer may also be a ready-made :class:`steppe.SAM`, as ``optimizers=(sam, None)``, or be made in the class
    form, ``optimizer_cls_and_kwargs=(steppe.SAM, {"base_class": torch.optim.AdamW, "rho": 0.05, "lr": 5e-5})``. If it
    has no ``model``, it gets the Trainer's model, so that its buffers are protected.

    Args:
        *args: Positional arguments of the Trainer.
        rho: The neighborhood radius; by default the method's own, 0.05 for SAM.
        method: Called as ``method(base, model=model, rho=rho)`` with the Trainer's own optimizer:
            :class:`steppe.SAM`, one of :mod:`steppe.variants`, or a function of your own. Give it further options
            with ``functools.partial(steppe.variants.looksam, interval=2)``.
        log_sharpness: Log ``perturbed_loss``, L(w + e), and ``sharpness``, L(w + e) - L(w), next to ``loss``: their
            means over the perturbed steps that had a pass at w.
        **kwargs: Keyword arguments of the Trainer.

    Raises:
        RuntimeError: A trainer that generates its data inside ``training_step`` (TRL's GRPO); DeepSpeed, FSDP1,
            Megatron, XLA, tensor, context or sequence parallelism, ``DataParallel``, or an optimizer that steps during
            the backward pass (LOMO, the layer-wise ones).
        TypeError: The radius is given twice, or ``method`` returns no :class:`steppe.SAM`.

    Example:
        >>> trainer = SAMTrainer(model=model, args=args, train_dataset=data, rho=0.05)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    def __init__(
        self,
        *args: Any,
        rho: float | None = None,
        method: Callable[..., SAM] = SAM,
        log_sharpness: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_class(self)
        ready_made = "a ready-made SAM is passed as optimizers=(sam, None)"
        self._method_options = MethodOptions(type(self).__name__, method, rho, ready_made=ready_made)
        self._log_sharpness = log_sharpness
        self._window: list[Any] = []
        self._mean_losses = MeanLosses()
        self._records = PlainAttributes(self, unread=("train_dataset", "eval_dataset"))
        super().__init__(*args, **kwargs)
        _check_supported(self)
        if isinstance(self.optimizer, SAM) and not self._method_options.are_default:
            raise TypeError(
                f"the {type(self.optimizer).__name__} in optimizers= has its own radius, so rho= and method= would "
                "have no effect: leave them out"
            )

    @property
    def current_pass(self) -> Pass | None:
        """The pass that runs now, to distinguish the passes in ``compute_loss``; None between steps."""
        return None if self.optimizer is None else unwrap_optimizer(self.optimizer).current_pass

    def sam_report(self) -> Report:
        """Return :meth:`steppe.SAM.report` of the optimizer.

        Raises:
            RuntimeError: There is no optimizer yet.
        """
        if self.optimizer is None:
            raise RuntimeError("sam_report() before train(): the Trainer has made no optimizer yet")
        return unwrap_optimizer(self.optimizer).report()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Create the Trainer's own optimizer, and wrap it unless it is a :class:`steppe.SAM` already."""
        super().create_optimizer(*args, **kwargs)
        own = unprepared(self.optimizer)  # a second train() finds a prepared one
        assert self.model is not None
        if not isinstance(own, SAM):
            self.optimizer = self._method_options.wrap(own, self.model)
        sam = unwrap_optimizer(self.optimizer)
        share_scaler(sam, self.accelerator)
        set_model_if_missing(sam, self.model)
        return self.optimizer  # type: ignore[return-value]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the passes of a step at its last micro-batch; return the loss of the first pass, and 0 before."""
        self._window.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        # If a callback has stopped an epoch within a window, older micro-batches are left over.
        window, self._window = self._window[-self.current_gradient_accumulation_steps :], []
        sam = unwrap_optimizer(self.optimizer)
        if hasattr(sam, "train"):
            sam.train()  # a schedule-free base; the Trainer calls it inside of the first pass, which may be at w + e
        _warn_of_gradients_made_before(sam)
        losses, step_losses = [], StepLosses()
        watched = sam._engine.closure_watched
        writes = None if watched else InPlaceWrites(named_tensors(window, "inputs"), "compute_loss")
        for sam_pass in sam.passes():
            if writes is not None and not sam_pass.is_first:
                writes.begin_further_pass(named_tensors(window, "inputs"))
            with contextlib.nullcontext() if sam_pass.is_first else self._unrecorded(model), sam_pass:
                losses.append(self._run_window(model, window, num_items_in_batch))
            step_losses.add(sam_pass, losses[-1])
            if writes is not None and not sam_pass.is_first:
                writes.check(sam._engine)
            if not sam_pass.is_first:  # the Trainer counts the operations of one pass
                self.current_flos += sum(float(self.floating_point_ops(inputs)) for inputs in window)  # type: ignore[assignment]
        if self._log_sharpness:
            self._mean_losses.add(step_losses)
        return losses[0]

    @contextlib.contextmanager
    def _unrecorded(self, model: nn.Module) -> Iterator[None]:
        """Restore the metrics and counters of the Trainer after a further pass, which also must not generate data."""
        own = vars(self.accelerator.unwrap_model(model))
        if guarded := "generate" not in own and not is_compiled_module(model):
            own["generate"] = _refuse_generation
        self._records.save()
        try:
            yield
        finally:
            self._records.restore()
            if guarded:
                del own["generate"]

    def _run_window(self, model: nn.Module, window: list[Any], num_items_in_batch: Any) -> Tensor:
        """Run forward and backward over all micro-batches; synchronize the processes at the last one."""
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        losses: list[Tensor] = []
        for left, inputs in zip(reversed(range(len(window))), window, strict=True):
            with contextlib.nullcontext() if each or left == 0 else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, inputs, num_items_in_batch))
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and add the metrics of ``log_sharpness`` to each entry that has a training loss.

        Calls of ``compute_loss`` in passes after the first are ignored.
        """
        if (sam_pass := self.current_pass) is not None and not sam_pass.is_first:
            return
        if "loss" in logs and (metrics := self._mean_losses.metrics(self.accelerator.gather)):
            logs = {**logs, **{name: value.item() for name, value in metrics.items()}}
            self._mean_losses = MeanLosses()
        super().log(logs, *args, **kwargs)


def _warn_of_gradients_made_before(sam: SAM) -> None:
    """Warn once of gradients that the passes clear: those of a callback's own backward."""
    engine = sam._engine
    if engine.has_warned("earlier gradient"):
        return
    if any(map(is_nonzero, engine.gradients.accumulated_earlier().values())):
        engine.warn_once(
            "earlier gradient",
            "a gradient was made before the passes of a step, by a backward outside of training_step (of a callback), "
            "and SAM's passes clear it: add the term to the loss, in compute_loss",
        )


class SAMTrainer(SAMTrainerMixin, Trainer):
    """The Trainer with :class:`SAMTrainerMixin`."""


def _refuse_generation(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "generate() was called in a pass after the first: this pass would get other data than the first one, because "
        "its weights are perturbed. Generate before the step, or in the first pass (current_pass.is_first), and keep "
        "the result"
    )


def _check_class(trainer: Trainer) -> None:
    if any(hasattr(trainer, name) for name in _GENERATES):
        raise RuntimeError(
            f"steppe.SAM with {type(trainer).__name__}: it generates its data inside training_step, so the second pass "
            "would get other data than the first one. Train on completions that were generated before the step "
            "(SFTTrainer, DPOTrainer, KTOTrainer, RewardTrainer)"
        )


def _check_supported(trainer: Trainer) -> None:
    check_supported(trainer.accelerator)
    if trainer.is_distributed_loading_by_transformers:
        raise RuntimeError(
            "steppe.SAM with a model sharded at load time (tp_plan=, distributed_config=): it has not been shown to "
            "equal one process. Load the whole model, and use DistributedDataParallel (torchrun)"
        )
    if trainer.args.n_gpu > 1:
        raise RuntimeError(
            f"steppe.SAM under nn.DataParallel on {trainer.args.n_gpu} GPUs: the replicas draw dropout masks that the "
            "second pass cannot repeat. Start with torchrun (DistributedDataParallel), or show the process one GPU "
            "with CUDA_VISIBLE_DEVICES"
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "layerwise" in optim or "lomo" in optim:
        raise RuntimeError(
            f"steppe.SAM with optim={optim!r}: it steps during each backward, so the weights would move in both "
            "passes. Use an optimizer that steps in step()"
        )
