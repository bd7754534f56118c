"""Hugging Face Trainer: every step makes its passes, and the rest of the Trainer sees one."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.sam import SAM

try:
    from transformers import Trainer

    from steppe.integrations.accelerate import innermost, know_scaler, refuse_unsupported, unwrapped
except ImportError as missing:
    raise ImportError(
        "steppe.integrations.transformers needs Transformers and Accelerate, and one of them is not installed: "
        "pip install 'steppe[transformers]'"
    ) from missing

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class SAMTrainerMixin(_Trainer):
    """Sharpness-aware minimization in any Trainer: put it first, ``class Mine(SAMTrainerMixin, Seq2SeqTrainer)``.

    A step runs all micro-batches of its accumulation window in each pass, when the last of them arrives; ``.grad`` is
    then what goes down, and the Trainer unscales, clips, logs and steps as ever. The logged loss is that at w (of a
    method whose only pass climbs, that at w + e), and its gradient norm that of what goes down.

    ``compute_loss`` and ``training_step`` run once a micro-batch *and pass*. What they count themselves is counted
    that often: ask :attr:`sam_pass`. Callbacks, logs, token counts, schedulers and checkpoints see one step.

    Args:
        *args: as for the Trainer.
        rho: the neighborhood radius; 0.05 if neither this nor ``sam`` is given.
        sam: instead of rho, makes the optimizer from the Trainer's own: ``partial(steppe.variants.asam, rho=0.5)``.
            Or pass a ready-made one as ``optimizers=(sam, None)``; or ``optimizer_cls_and_kwargs=(steppe.SAM,
            {"base_class": torch.optim.AdamW, "rho": 0.05, "lr": 5e-5})``.
        log_sharpness: log ``perturbed_loss``, L(w + e), and ``sharpness``, L(w + e) - L(w), next to the loss: their means
            over the steps that climbed from a pass at w.
        **kwargs: as for the Trainer.

    A SAM without ``model=`` gets the Trainer's model, so that its buffers are protected.

    Raises:
        RuntimeError: DeepSpeed, FSDP, Megatron, XLA, tensor, context or sequence parallelism, ``DataParallel``, or an
            optimizer that steps during the backward (LOMO, the layer-wise ones).
        TypeError: two radii, or a ``sam`` that makes no :class:`steppe.SAM`.

    >>> trainer = SAMTrainer(model=model, args=args, train_dataset=data, rho=0.05)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    def __init__(
        self,
        *args: Any,
        rho: float | None = None,
        sam: Callable[[Optimizer], SAM] | None = None,
        log_sharpness: bool = False,
        **kwargs: Any,
    ) -> None:
        if rho is not None and sam is not None:
            raise TypeError(f"rho={rho} and sam=: give the radius to sam itself, or rho alone")
        if isinstance(sam, Optimizer):
            raise TypeError("sam= is an optimizer, and its place is optimizers=(optimizer, None): sam= makes one")
        self._make_sam = sam if sam is not None else partial(SAM, rho=0.05 if rho is None else rho)
        self._log_sharpness = log_sharpness
        self._window: list[Any] = []
        self._climbs = 0
        self._ascent: Tensor | float = 0.0
        super().__init__(*args, **kwargs)
        _refuse(self)
        if (rho is not None or sam is not None) and isinstance(self.optimizer, SAM):
            raise TypeError(
                f"the {type(self.optimizer).__name__} in optimizers= has its radius, so rho= or sam= would have no "
                "effect: leave it out"
            )

    @property
    def current_pass(self) -> Any:
        """The pass that runs now, for a ``compute_loss`` that wants to know: ``sam_pass.is_first``; None outside of one."""
        return None if self.optimizer is None else unwrapped(self.optimizer).current_pass

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Make the Trainer's own optimizer, and wrap it unless it is a :class:`steppe.SAM` already."""
        super().create_optimizer(*args, **kwargs)
        own = innermost(self.optimizer)  # the second train() finds a prepared one
        if not isinstance(own, SAM):
            self.optimizer = self._make_sam(own)
        sam = unwrapped(self.optimizer)
        know_scaler(sam, self.accelerator)
        if sam.model is None:
            sam.model = self.model
            sam._engine.protect(self.model, replay_rng=sam.replay_rng)
        return self.optimizer  # type: ignore[return-value]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the passes of a step when the last micro-batch arrives; return the loss of all of them, before it 0."""
        self._window.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        # a callback may have stopped an epoch within a window: its micro-batches are not this step's
        window, self._window = self._window[-self.current_gradient_accumulation_steps :], []
        losses: list[Tensor] = []
        at_w = climbed = False
        for sam_pass in unwrapped(self.optimizer).passes():
            with sam_pass:
                losses.append(self._pass(model, window, num_items_in_batch))
            at_w, climbed = at_w or not sam_pass.is_perturbed, sam_pass.is_perturbed
            if not sam_pass.is_first:
                self.current_flos += sum(float(self.floating_point_ops(inputs)) for inputs in window)  # type: ignore[assignment]
        if self._log_sharpness and at_w and climbed:
            self._climbs += 1
            self._ascent = self._ascent + torch.stack([losses[-1], losses[0]])
        return losses[0]

    def _pass(self, model: nn.Module, window: list[Any], num_items_in_batch: Any) -> Tensor:
        """Forward and backward over all micro-batches; the processes are synchronized at the last."""
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        losses: list[Tensor] = []
        for left, inputs in zip(reversed(range(len(window))), window, strict=True):
            with contextlib.nullcontext() if each or left == 0 else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, inputs, num_items_in_batch))
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and beside the loss what ``log_sharpness`` asks for."""
        if "loss" in logs and isinstance(self._ascent, Tensor):
            both = self.accelerator.gather(self._ascent.unsqueeze(0)).mean(0) / self._climbs
            climbed, at_w = both.tolist()
            logs = {**logs, "perturbed_loss": climbed, "sharpness": climbed - at_w}
            self._climbs, self._ascent = 0, 0.0
        super().log(logs, *args, **kwargs)


class SAMTrainer(SAMTrainerMixin, Trainer):
    """The Trainer, with :class:`SAMTrainerMixin`."""


def _refuse(trainer: Trainer) -> None:
    refuse_unsupported(trainer.accelerator)
    if trainer.is_distributed_loading_by_transformers:
        raise RuntimeError(
            "steppe.SAM with a model sharded at load time (tp_plan=, distributed_config=): it has not been shown to "
            "equal one process. Load the model whole, and use DistributedDataParallel (torchrun)"
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
            "passes. Take an optimizer that steps in step()"
        )
