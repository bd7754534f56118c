"""Lightning: SAM as a callback, around the optimizers that the module configures."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from steppe._engine.report import Report
from steppe.integrations._lightning_optimizer import SAMLightningOptimizer
from steppe.integrations._lightning_package import pl
from steppe.integrations._lightning_window import AccumulationWindow
from steppe.integrations._method_options import MethodOptions, set_model_if_missing
from steppe.integrations._pass_losses import StepLosses
from steppe.rules import Cadence, Combination, Perturbation
from steppe.sam import SAM, Pass

_FINDERS = (pl.callbacks.LearningRateFinder, pl.callbacks.BatchSizeFinder)


class SAMCallback(pl.Callback):
    """Train with sharpness-aware minimization: ``Trainer(callbacks=[SAMCallback(rho=0.05)])``.

    Each optimizer that ``configure_optimizers`` returns is wrapped, and its schedulers stay as they are. A ready-made
    :class:`steppe.SAM` is not wrapped again; if it has no ``model``, it gets the module, so that its buffers are
    protected.

    The first pass of a step is Lightning's own. The further ones run ``training_step`` and backward alone, on all
    micro-batches of ``accumulate_grad_batches``. During them ``self.log`` and the hooks of callbacks are muted, and
    afterwards plain attributes of modules (numbers, lists, torchmetrics) are restored. The module's own
    ``on_before_backward`` and ``on_after_backward`` run in every pass, because they may change the gradient. Clipping,
    ``configure_gradient_clipping`` and ``on_before_optimizer_step`` see the update gradient, once, unscaled. Calls
    that bypass ``self.log`` (a logger's own methods, print) and objects that are neither modules nor plain containers
    are not covered.

    The trial steps of Lightning's learning-rate finder and batch-size finder are steps of SAM too.

    In manual optimization, ``opt = self.optimizers()`` returns a SAM whose steps Lightning counts and scales. Write
    ``opt.step(closure)`` with the usual closure (``opt.zero_grad()``, forward, ``self.manual_backward(loss)``), or
    write the passes, and after them whatever changes the update gradient::

        for sam_pass in opt.passes():
            with sam_pass:
                self.manual_backward(self.loss(batch))
        opt.step()

    Args:
        method: Called as ``method(base, model=module, rho=rho, **options)``: :class:`steppe.SAM`, one of
            :mod:`steppe.variants`, or a function of your own; SAM by default. With DDP, ``module`` is the
            ``DistributedDataParallel``.
        rho: The neighborhood radius; by default the method's own, 0.05 for SAM.
        optimizers: The indices of the optimizers to wrap; all by default.
        log_sharpness: Log ``perturbed_loss``, L(w + e), and ``sharpness``, L(w + e) - L(w), at each perturbed step, of
            the samples of this process, without waiting for the device. In automatic optimization only.
        perturbation, combination, cadence: The rules of :class:`steppe.SAM`, for a method that takes them.
        replay_rng, per_rank, stochastic_rounding: As for :class:`steppe.SAM`; by default the method's own.
        **options: Further options of the method.

    Raises:
        TypeError: ``method`` is not a function, the radius is given twice, or (in ``fit``) the method returns no
            :class:`steppe.SAM`.
        ValueError: (in ``fit``) options are given for a ready-made SAM, or an index is out of range.
        RuntimeError: (in ``fit``) a strategy, a precision or a ``training_step`` whose passes cannot be repeated; a
            step without passes.

    Example:
        >>> callback = SAMCallback(rho=0.05, log_sharpness=True)
        >>> callback = SAMCallback(steppe.variants.asam, rho=0.5)  # doctest: +SKIP
        >>> trainer = pl.Trainer(callbacks=[callback])  # doctest: +SKIP

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    def __init__(
        self,
        method: Callable[..., SAM] | None = None,
        *,
        rho: float | None = None,
        optimizers: Sequence[int] | None = None,
        log_sharpness: bool = False,
        perturbation: Perturbation | None = None,
        combination: Combination | None = None,
        cadence: Cadence | None = None,
        replay_rng: bool | None = None,
        per_rank: bool | None = None,
        stochastic_rounding: bool | None = None,
        **options: Any,
    ) -> None:
        # Written out, so that a parser (LightningCLI) knows them; None is the method's default.
        rules = {"perturbation": perturbation, "combination": combination, "cadence": cadence}
        modes = {"replay_rng": replay_rng, "per_rank": per_rank, "stochastic_rounding": stochastic_rounding}
        options |= {name: value for name, value in {**rules, **modes}.items() if value is not None}
        method = SAM if method is None else method
        ready_made = "a ready-made SAM is returned from configure_optimizers"
        self._method_options = MethodOptions("SAMCallback", method, rho, ready_made=ready_made, **options)
        self._indices, self._log_sharpness = optimizers, log_sharpness
        self._optimizers: list[SAMLightningOptimizer] = []
        self._reports: list[Report] = []

    @property
    def current_pass(self) -> Pass | None:
        """The pass that runs now, to distinguish the passes in ``training_step``; None between steps."""
        passes = (optimizer.current_pass for optimizer in self._optimizers)
        return next((sam_pass for sam_pass in passes if sam_pass is not None), None)

    def reports(self) -> list[Report]:
        """Return :meth:`steppe.SAM.report` of each optimizer, in ``fit`` and after its end."""
        return [optimizer.report() for optimizer in self._optimizers] or self._reports

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Raise an error for what is not supported, before training starts."""
        if stage == "fit":
            _check_supported(trainer, pl_module)
            if any(isinstance(callback, _FINDERS) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                # The finders run their trials in on_fit_start, and Lightning puts them first: the trial steps would be
                # plain ones.
                others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
                trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
            if self._log_sharpness and not pl_module.automatic_optimization:
                raise RuntimeError(
                    "SAMCallback(log_sharpness=True) in manual optimization: the losses of the passes are known in "
                    "training_step only. Log them there, and distinguish them by sam_pass.is_perturbed"
                )

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Wrap the optimizers: Lightning makes them before this hook, and loads a checkpoint into them after it."""
        strategy = trainer.strategy
        optimizers: list[Any] = list(strategy.optimizers)
        chosen = range(len(optimizers)) if self._indices is None else self._indices
        if any(not 0 <= index < len(optimizers) for index in chosen):
            raise ValueError(
                f"SAMCallback(optimizers={list(chosen)}): configure_optimizers returned {len(optimizers)}, so count "
                f"from 0 to {len(optimizers) - 1}"
            )
        assert strategy.model is not None
        for index, optimizer in enumerate(optimizers):
            sam = self._wrap(optimizer, strategy.model) if index in chosen else optimizer
            if isinstance(sam, SAM) and not isinstance(sam, SAMLightningOptimizer):
                sam.scaler = getattr(trainer.precision_plugin, "scaler", None)
                window = AccumulationWindow(sam, trainer) if pl_module.automatic_optimization else None
                optimizers[index] = sam_optimizer = SAMLightningOptimizer(sam, trainer, window)
                self._optimizers.append(sam_optimizer)
        # Lightning wraps what it finds here, but not its own wrappers. So ours are still there after a finder has
        # replaced this list.
        strategy.optimizers = optimizers

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the losses of a perturbed step."""
        for window in self._windows():
            losses, window.losses = window.losses, StepLosses()
            for name, value in losses.metrics().items() if self._log_sharpness else ():
                pl_module.log(name, value)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Keep the reports, and write their hints to Lightning's log."""
        self._reports = self.reports()
        for hint in [hint for report in self._reports for hint in report.hints]:
            pl.utilities.rank_zero_info(f"SAMCallback: {hint}")

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Restore the weights."""
        for optimizer in self._optimizers:
            optimizer.restore()
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Restore the strategy."""
        for window in self._windows():
            window.uninstall()
        self._optimizers = []

    def _windows(self) -> list[AccumulationWindow]:
        return [optimizer.window for optimizer in self._optimizers if optimizer.window is not None]

    def _wrap(self, base: Optimizer, model: nn.Module) -> SAM:
        if not isinstance(base, SAM):
            return self._method_options.wrap(base, model)
        if not self._method_options.are_default:
            raise ValueError(
                f"configure_optimizers has returned a {type(base).__name__}, so {self._method_options} of SAMCallback "
                "would have no effect: return the base optimizer there, or write SAMCallback() here"
            )
        set_model_if_missing(base, model)
        return base


class ConfiguredSAM(SAM):
    """SAM that is built from the parameters and a function that makes its base, as LightningCLI calls optimizers.

    Train it with ``SAMCallback()``. A file has the base and the rules by their class paths::

        optimizer:
          class_path: steppe.integrations.lightning.ConfiguredSAM
          init_args:
            base: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
            rho: 0.5
            perturbation: {class_path: steppe.Adaptive, init_args: {eta: 0.01}}

    Args:
        params: The parameters, or their groups.
        base: Called with the parameters; returns the base optimizer.
        rho: As for :class:`steppe.SAM`, like the other options.
        perturbation, combination, cadence: The rules; None for those of SAM.
        replay_rng, per_rank, stochastic_rounding: As for :class:`steppe.SAM`.
    """

    def __init__(
        self,
        params: Any,
        base: Callable[[Any], Optimizer],
        rho: float = 0.05,
        *,
        perturbation: Perturbation | None = None,
        combination: Combination | None = None,
        cadence: Cadence | None = None,
        replay_rng: bool = True,
        per_rank: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        rules = {"perturbation": perturbation, "combination": combination, "cadence": cadence}
        given: dict[str, Any] = {name: rule for name, rule in rules.items() if rule is not None}
        given |= {"replay_rng": replay_rng, "per_rank": per_rank, "stochastic_rounding": stochastic_rounding}
        super().__init__(base(params), rho, **given)


def _check_supported(trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
    if not isinstance(trainer, pl.Trainer):
        raise RuntimeError(
            f"the Trainer is from {type(trainer).__module__.partition('.')[0]}, but steppe.integrations.lightning uses "
            f"{pl.__name__}, which was imported first: import only the package of your Trainer, and import it before "
            "steppe.integrations.lightning"
        )
    strategy, precision = trainer.strategy, trainer.precision_plugin
    if not isinstance(strategy, pl.strategies.SingleDeviceStrategy | pl.strategies.DDPStrategy):
        raise RuntimeError(
            f"SAMCallback with {type(strategy).__name__}: it shards weights, or takes the steps itself, so w would not "
            "be perturbed as a whole. Use strategy='ddp' or a single device"
        )
    # These two run the closure at a known moment: in optimizer.step(closure), or before scaler.step(optimizer).
    if type(precision).optimizer_step not in (
        pl.plugins.Precision.optimizer_step,
        pl.plugins.MixedPrecision.optimizer_step,
    ):
        raise RuntimeError(
            f"SAMCallback with {type(precision).__name__}: its optimizer_step is its own, so the moment at which it "
            "runs the closure is unknown. Use precision='32-true', '64-true', '16-mixed', 'bf16-mixed' or 'bf16-true'"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise RuntimeError(
            "SAMCallback with training_step(self, dataloader_iter): the second pass cannot take the same batch from "
            "the iterator again. Write training_step(self, batch, batch_idx)"
        )
