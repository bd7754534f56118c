"""Keras 3 on PyTorch: a model whose fit() makes SAM's passes around the optimizer that it was compiled with."""

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.sam import SAM

if "keras" not in sys.modules:
    os.environ.setdefault("KERAS_BACKEND", "torch")
try:
    import keras  # type: ignore[import-untyped]
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"steppe.integrations.keras needs Keras 3 on PyTorch, and {missing.name} is not installed: pip install "
        "'steppe[keras]', and set the environment variable KERAS_BACKEND=torch"
    ) from missing
if keras.config.backend() != "torch":
    raise ImportError(
        f"Keras was imported on {keras.config.backend()}, and Steppe perturbs PyTorch's tensors: set the environment "
        "variable KERAS_BACKEND=torch before the first import of keras"
    )


class SharpnessAware:
    """Sharpness-aware minimization in any Keras model: put it first, ``class Net(SharpnessAware, keras.Model)``.

    The optimizer of ``compile`` is the base, so its schedules, clipping, weight decay and accumulation go on (with
    ``gradient_accumulation_steps``, each batch gets a climb of its own). ``fit``, callbacks, ``save`` and
    ``load_model`` stay as they are. What a pass changes in the model, BatchNorm's averages, seeds of dropout and
    metrics, is left as one ordinary pass leaves it; loss and metrics are those of the step's first pass.

    :attr:`sam` is the optimizer; every ``compile`` leads to a new one. ``model.save`` keeps all of a method without a
    memory or a cadence. Of any other, keep ``model.sam.state_dict()`` too, and load it after
    ``model.make_train_function()``.

    Raises:
        ValueError: (from ``fit``) a model compiled without an optimizer, with ``jit_compile=True``, or with a dynamic
            loss scale (mixed_float16).

    >>> class Net(SharpnessAware, keras.Sequential):
    ...     def make_sam(self, base, model):
    ...         return SAM(base, rho=0.1, model=model)
    >>> model = Net([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(0.1), loss="mse")
    >>> _ = model.fit(torch.ones(4, 2), torch.ones(4, 1), verbose=0)
    >>> int(model.optimizer.iterations.value)
    1

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    sam: SAM
    # Keras' own:
    optimizer: Any
    train_function: Any
    jit_compile: bool
    compute_metrics: Any
    _compute_loss: Any
    _loss_tracker: Any
    _call_has_training_arg: bool

    def make_sam(self, base: Optimizer, model: nn.Module) -> SAM:
        """Override this to choose the method and its radius: ``return steppe.variants.asam(base, 0.5, model=model)``.

        Args:
            base: the Keras optimizer, as a PyTorch one.
            model: this model, as a module whose buffers are all that a pass changes in it.
        """
        return SAM(base, rho=0.05, model=model)

    def make_train_function(self, force: bool = False) -> Any:
        """Build the optimizer; Keras calls this at the start of ``fit``."""
        if self.train_function is None or force:
            self._refuse_unsupported()
            self.sam = self.make_sam(KerasOptimizer(self), Stateful(self))
        return super().make_train_function(force)  # type: ignore[misc]

    def train_step(self, data: Any) -> Any:
        """All passes of one step."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logs = None
        for sam_pass in self.sam.passes():
            with sam_pass:
                y_pred = self(x, training=True) if self._call_has_training_arg else self(x)  # type: ignore[operator]
                loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
                self.optimizer.scale_loss(loss).backward()
                if sam_pass.is_first:
                    with torch.no_grad():
                        self._loss_tracker.update_state(loss, sample_weight=len(keras.tree.flatten(x)[0]))
                        logs = self.compute_metrics(x, y, y_pred, sample_weight)
        self.sam.step()
        return logs

    def _refuse_unsupported(self) -> None:
        if self.optimizer is None:
            raise ValueError(
                "the model was compiled without an optimizer, and SAM needs a base: compile(optimizer=...)"
            )
        if self.jit_compile:
            raise ValueError(
                "jit_compile=True would compile the passes of SAM, and torch.compile drops what they write to the "
                "optimizer: compile(jit_compile=False), and torch.compile the model's own layers instead"
            )
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "Keras lowers its loss scale when it sees gradients that overflow, and SAM skips such a step before "
                "Keras sees it, so training would stand still: use mixed_bfloat16, or a fixed loss_scale_factor"
            )


class KerasOptimizer(Optimizer):
    """The Keras optimizer that a model was compiled with, as a PyTorch optimizer.

    Its state stays in Keras' variables, and so in Keras' checkpoints: :attr:`state` is empty.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._variables = list(model.trainable_variables)
        super().__init__([v.value for v in self._variables], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients.

        Raises:
            RuntimeError: which variables are trainable has changed since ``compile``.
        """
        if [id(v) for v in self._model.trainable_variables] != [id(v) for v in self._variables]:
            raise RuntimeError(
                "the model's trainable variables changed after compile(), and SAM would not climb along the new ones: "
                "call compile() again after setting .trainable"
            )
        self._model.optimizer.apply([v.value.grad for v in self._variables], self._variables)


class Stateful(nn.Module):
    """What a pass changes in a Keras model, as buffers: Keras keeps it in parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        changed: list[Tensor] = [v.value for v in model.non_trainable_variables + model.metrics_variables]
        for index, tensor in enumerate(changed):
            self.register_buffer(f"variable_{index}", tensor)
