"""Keras 3 on PyTorch: a model whose fit() makes SAM's passes around the optimizer that it was compiled with."""

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.integrations._method_options import MethodOptions
from steppe.integrations._pass_losses import MeanLosses, StepLosses
from steppe.sam import SAM, Pass

if "keras" not in sys.modules:
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read once, at the import of keras below
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

    The optimizer of ``compile`` is the base, with its schedules, clipping, weight decay and accumulation (with
    ``gradient_accumulation_steps``, each batch gets a perturbation of its own). ``fit``, callbacks, ``save`` and
    ``load_model`` work as usual. A pass changes averages of BatchNorm, seeds of dropout and metrics; after a step they
    are what one ordinary pass leaves. Loss and metrics are those of the step's first pass.

    The options are class attributes, because Keras constructs a new model when it loads one. ``clone_model`` of a
    ``Sequential`` makes a plain one, without SAM: clone it by ``Net.from_config(model.get_config())``.

    For a method with neither a memory nor a cadence, ``model.save`` is enough to resume. For any other, save
    ``model.sam.state_dict()`` too, and load it after ``model.make_train_function()``.

    Attributes:
        method: called as ``method(base, model=model, rho=rho)``: :class:`steppe.SAM`, one of :mod:`steppe.variants`, or
            a function of your own. Give it further options with ``functools.partial(steppe.variants.looksam,
            interval=2)``. ``base`` is the Keras optimizer as a PyTorch one, and ``model`` a module whose buffers are
            all that a pass changes in this model.
        rho: the neighborhood radius; by default the method's own, 0.05 for SAM.
        log_sharpness: log ``perturbed_loss``, L(w + e), and ``sharpness``, L(w + e) - L(w), next to ``loss``: their
            means over the perturbed steps of an epoch that had a pass at w.
        sam: the :class:`steppe.SAM` that trains the model, made anew after every ``compile``.

    Raises:
        ValueError: (from ``fit``) a model compiled without an optimizer, with ``jit_compile=True``, or with a dynamic
            loss scale (mixed_float16).
        TypeError: (from ``fit``) ``method`` is not a function, or returns no :class:`steppe.SAM`.

    Example:
        >>> class Net(SharpnessAware, keras.Sequential):
        ...     rho = 0.1
        >>> model = Net([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.SGD(0.1), loss="mse")
        >>> _ = model.fit(torch.ones(4, 2), torch.ones(4, 1), verbose=0)
        >>> int(model.optimizer.iterations.value)
        1

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    method: ClassVar[Callable[..., SAM]] = SAM
    rho: ClassVar[float | None] = None
    log_sharpness: ClassVar[bool] = False
    sam: SAM
    # Keras' own. The private ones are those of its train_step, which train_step below repeats once a pass.
    optimizer: Any
    train_function: Any
    jit_compile: bool
    compute_metrics: Any
    _compute_loss: Any
    _loss_tracker: Any
    _call_has_training_arg: bool

    @property
    def current_pass(self) -> Pass | None:
        """The pass that runs now, to distinguish the passes in ``call`` or a loss; None between steps."""
        sam = getattr(self, "sam", None)
        return None if sam is None else sam.current_pass

    def make_train_function(self, force: bool = False) -> Any:
        """Make the optimizer; Keras calls this at the start of ``fit``."""
        if self.train_function is None or force:
            self._check_supported()
            method = inspect.getattr_static(self, "method")  # not bound to the model, as a function would be
            method = method.__func__ if isinstance(method, staticmethod) else method
            options = MethodOptions(type(self).__name__, method, self.rho)
            self.sam = options.wrap(KerasOptimizer(self), VariablesAsBuffers(self))
            self._mean_losses = MeanLosses()
        return super().make_train_function(force)  # type: ignore[misc]

    def train_step(self, data: Any) -> Any:
        """Run all passes of one step; return the metrics of the first."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logs, losses = None, StepLosses()
        for sam_pass in self.sam.passes():
            with sam_pass:
                y_pred = self(x, training=True) if self._call_has_training_arg else self(x)  # type: ignore[operator]
                loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
                self.optimizer.scale_loss(loss).backward()
                losses.add(sam_pass, loss.detach())
                if sam_pass.is_first:
                    with torch.no_grad():
                        self._loss_tracker.update_state(loss, sample_weight=len(keras.tree.flatten(x)[0]))
                        logs = self.compute_metrics(x, y, y_pred, sample_weight)
        self.sam.step()
        if not self.log_sharpness:
            return logs
        self._mean_losses.add(losses)
        return {**(logs or {}), **self._mean_losses.metrics()}

    def reset_metrics(self) -> None:
        """Reset the metrics; Keras calls this at the start of an epoch."""
        super().reset_metrics()  # type: ignore[misc]
        self._mean_losses = MeanLosses()

    def _check_supported(self) -> None:
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
                "mixed_float16 does not work with SAM: Keras lowers its loss scale when its optimizer gets gradients "
                "that overflow, but SAM skips such a step, so all further steps would be skipped too. Use "
                "mixed_bfloat16, or a fixed loss_scale_factor"
            )


class KerasOptimizer(Optimizer):
    """The Keras optimizer that a model was compiled with, as a PyTorch optimizer.

    Its state stays in Keras' variables, and so in Keras' checkpoints: ``state`` is empty.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._variables = list(model.trainable_variables)
        super().__init__([v.value for v in self._variables], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients.

        Raises:
            RuntimeError: The set of trainable variables has changed since ``compile``.
        """
        if [id(v) for v in self._model.trainable_variables] != [id(v) for v in self._variables]:
            raise RuntimeError(
                "the model's trainable variables changed after compile(), and SAM would not perturb the new ones: "
                "call compile() again after setting .trainable"
            )
        self._model.optimizer.apply([v.value.grad for v in self._variables], self._variables)


class VariablesAsBuffers(nn.Module):
    """The variables of a Keras model that a pass changes, as buffers.

    Keras keeps them in parameters, and those of metrics outside of the module that ``model=`` gets.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        changed: list[Tensor] = [v.value for v in model.non_trainable_variables + model.metrics_variables]
        for index, tensor in enumerate(changed):
            self.register_buffer(f"variable_{index}", tensor)
