"""The optimizer, with three APIs of a step: a closure, explicit passes, and the classic two calls."""

from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar, Unpack, cast, get_overloads, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe import papers
from steppe._engine.callers import called_by_scaler, refuse_accumulation
from steppe._engine.closure import Closure
from steppe._engine.constructor import (
    Model,
    Options,
    Params,
    base_and_rho,
    check_classic,
    check_group,
    check_groups,
    check_model,
    drop_earlier_radii,
    one_module,
)
from steppe._engine.eager import eager
from steppe._engine.engine import Engine
from steppe._engine.groups import RHO
from steppe._engine.joint_base import Base, optimizers_of, option_names
from steppe._engine.loss_scale import ScalerTarget
from steppe._engine.passes import Pass, Passes
from steppe._engine.signatures import show_signature
from steppe._engine.slots import OPTIONS, SLOTS, accepted_rules
from steppe._engine.stage import Stage, out_of_order
from steppe._engine.step import SAMStep
from steppe.rules import Cadence, Combination, Perturbation
from steppe.rules.l2 import L2
from steppe.rules.periodic import Periodic
from steppe.rules.perturbed_gradient import PerturbedGradient

__all__ = ["SAM", "Closure", "Params", "Pass", "Stage"]

_DEFAULT_PERTURBATION, _DEFAULT_COMBINATION, _DEFAULT_CADENCE = L2(), PerturbedGradient(), Periodic()
_NO_ATTRIBUTES = ("base", "memory", "steps", "displaced")  # of a copied state, which are set otherwise


class SAM(SAMStep):
    """Sharpness-aware minimization around any base optimizer.

    min_w max_{|e| <= rho} L(w + e): a first pass at w gives g, a second one at w + e gives g_s, and the base optimizer
    steps from w with a combination of the two. By default e = rho g / |g| over all parameters (:class:`L2`), and the
    combination is g_s. ``param_groups``, ``state`` and ``defaults`` *are* the base's, so that learning-rate schedules,
    clipping, checkpoints and hooks work on either object.

    A step has three APIs: ``step(closure)``, the explicit :meth:`passes`, and the classic
    :meth:`first_step` / :meth:`second_step`. Each leaves weights, buffers and random generators as one ordinary pass
    would. The class form ``SAM(params, BaseClass, rho=..., **kwargs)`` builds the base from its class.

    Args:
        base_optimizer: An instance of any optimizer that does not need a closure of its own; or a list of several, such
            as Muon for the matrices and AdamW for the rest, which then share one perturbation and one checkpoint.
        rho: The radius of the neighborhood, at least 0: a length in the space of all weights, or what the perturbation
            takes it for. It is the default of every group; a group may have its own ``sam_rho``.
        model: The module that the passes run; several in a list, tuple or dict. With it, the second pass leaves no
            trace in it: buffers (BatchNorm's running statistics, ...), parameters that belong to other optimizers or to
            none, their gradients, and numbers, tensors and random generators in attributes of modules. It starts from
            the state from which the first one started.
        perturbation: How to perturb, :class:`~steppe.L2` or any :class:`~steppe.rules.Perturbation`.
        combination: Which update gradient to make of g and g_s, any :class:`~steppe.rules.Combination`.
        cadence: At which steps to perturb, any :class:`~steppe.rules.Cadence`.
        replay_rng: Let the second pass draw the same random numbers (dropout masks, ...) as the first.
        per_rank: With a ``DistributedDataParallel`` model, perturb each rank along the gradient of its own samples
            (m-sharpness, m = the samples of a rank: the SAM paper's setting), and average the gradients found there.
            It saves the communication of the first pass. Without it, all ranks share the perturbation that one process
            would have on all samples.
        scaler: The loss scaler of a loop in float16. With it, ``step(closure)`` works there too, and rules that depend
            on the size of the gradients see them unscaled. It belongs to the loop: copies have none.
        stochastic_rounding: Round perturbed weights in half precision up or down at random. A perturbation is often
            smaller than their last bit: rounding to nearest would lose it, and with this it survives on average.

    Raises:
        ValueError: A rho that is negative or not finite, no parameters, a model that does not hold them; ``per_rank``
            with a model or rules that do not support it.
        TypeError: A rho that is no number; a base that is not an optimizer, or that needs its own closure (LBFGS); an
            engine under which SAM would be silently wrong (FSDP1, DeepSpeed).

    A step whose gradient is not finite in either pass is skipped, and counted in :attr:`skipped_steps`. On an
    accelerator this is decided without synchronization: exactly by a base that takes ``found_inf`` (``fused=True``);
    any other base gets a zero gradient for that step, so that only its momentum and weight decay act.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss_at_w = optimizer.step(closure)

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    paper: ClassVar[papers.Paper] = papers.SAM

    @overload
    def __init__(self, base_optimizer: Base, rho: float | Tensor = 0.05, **options: Unpack[Options]) -> None: ...
    @overload
    def __init__(
        self, params: Params, base_class: Callable[..., Optimizer], rho: float | Tensor = 0.05, **kwargs: Any
    ) -> None: ...
    def __init__(
        self,
        *args: Any,
        model: Model | None = None,
        perturbation: Perturbation = _DEFAULT_PERTURBATION,
        combination: Combination = _DEFAULT_COMBINATION,
        cadence: Cadence = _DEFAULT_CADENCE,
        replay_rng: bool = True,
        per_rank: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        stochastic_rounding: bool = False,
        **kwargs: Any,
    ) -> None:
        base, rho = base_and_rho(*args, **kwargs)
        model = one_module(model)
        check_model(model, base)
        rules = {"perturbation": perturbation, "combination": combination, "cadence": cadence}
        rules = accepted_rules(self, base, per_rank=per_rank, **rules)
        drop_earlier_radii(base)
        options = dict(zip(OPTIONS, (model, replay_rng, per_rank, stochastic_rounding), strict=True))
        self.__setstate__({"base": base, "_default_rho": rho, "scaler": scaler, **options, **rules})
        self._engine.gradients.mark_left()  # the base may have trained without SAM before
        for group in base.param_groups:
            group.setdefault(RHO, rho)
        check_groups(base)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("base", "_default_rho", *OPTIONS, *SLOTS)}
        engine = self._engine
        engine.load_from_base()
        return {**own, "memory": engine.memory, "steps": engine.steps, "displaced": engine.displaced()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._base = state["base"]  # first: torch's __setstate__ reads our defaults, which are the base's
        super().__setstate__({})
        for name, value in state.items():
            if name not in _NO_ATTRIBUTES:
                setattr(self, name, value)
        self._scaler_target = ScalerTarget(self._take_step)
        self._engine = Engine(self.base, **{name: state[name] for name in OPTIONS})
        self._engine.memory = state.get("memory", self._engine.memory)
        self._engine.steps = state.get("steps", self._engine.steps)
        self._engine.write_unperturbed(state.get("displaced", []))  # copied in the middle of a step

    def __repr__(self) -> str:
        rules = f"perturbation={self.perturbation}, combination={self.combination}, cadence={self.cadence}"
        return f"{type(self).__name__}({rules}, base={self.base!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its radius is its ``sam_rho``, or else this optimizer's rho.

        Raises:
            RuntimeError: A step is pending, whose second pass does not know the new parameters.
        """
        if self._engine.stage in (Stage.AFTER_FIRST_STEP, Stage.IN_PASS):
            raise out_of_order("add_param_group()", self._engine.stage)
        group = {RHO: self._default_rho, **param_group}
        check_group(len(self.param_groups), group, option_names(self.base))
        self.base.add_param_group(group)
        self._engine.protect(self.model)

    @property
    def current_pass(self) -> Pass | None:
        """The pass that is running, for a closure that depends on it; None outside of a pass."""
        engine = self._engine
        return cast(Pass, engine.current_pass) if engine.stage is Stage.IN_PASS else None

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because a gradient was not finite; reading it waits for the device."""
        return int(self._engine.gradients.skipped)

    # The three APIs of a step.

    @eager
    def passes(self, *, accumulate: bool = False, loss_weight: float | None = None) -> Iterator[Pass]:
        """Yield the passes of one step, each a context manager for one forward+backward over all micro-batches.

        Every pass starts with cleared gradients. After the loop, the weights are restored to w and ``.grad`` holds the
        update gradient, ready for unscaling, clipping and :meth:`step`.

        Args:
            accumulate: Add the update gradient to the earlier ``.grad``. One loop for each micro-batch then gives
                each its own perturbation (m-sharpness with a smaller m). For one perturbation of all micro-batches,
                run all of them inside each pass instead. A micro-batch whose loop is left by an exception or a break
                is left out of the step.
            loss_weight: The micro-batch's share of the samples, by which its loss is multiplied. Give it in each loop
                if a rule depends on the size of the gradients or has a memory (F-SAM, VaSSO, Fisher SAM, bSAM).

        Raises:
            RuntimeError: In these cases:

                - A step is pending, or a pass was not entered by ``with``.
                - The loop runs inside of ``accelerator.accumulate()``, so that other micro-batches would be lost.
                - ``accumulate`` with a rule that does not support it, or that needs ``loss_weight``.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=0.5)
            >>> for sam_pass in optimizer.passes():
            ...     with sam_pass:
            ...         w.square().sum().div(2).backward()
            >>> w.grad
            tensor([3.3000, 4.4000])
            >>> optimizer.step()
        """
        return Passes(self._loop(loss_weight, accumulate=accumulate))

    def _loop(self, loss_weight: float | None, *, accumulate: bool) -> Generator[Pass]:
        """Yield the passes of one step; :meth:`passes` describes it."""
        if not accumulate:
            refuse_accumulation()
            self._warn_of_lost_gradient()
        engine, loop = self._engine, object()  # a new object, to recognize this loop below
        if engine.stage is Stage.BETWEEN_PASSES:
            engine.leave_loop()  # Python has not closed that loop yet
        if accumulate and engine.stage is Stage.INCOMPLETE:
            engine.gradients.clear_left()
        is_first = not accumulate or engine.stage is not Stage.READY
        self._begin("passes()")
        self._begin_micro_batch(loss_weight, accumulate=accumulate, is_first=is_first)
        try:
            engine.loop = loop
            engine.gradients.before_loop = engine.gradients.copies() if accumulate else None
            for sam_pass in self._step_passes(accumulate=accumulate):
                engine.current_pass = sam_pass
                yield sam_pass
                sam_pass.check()
            engine.micro_batches.end(engine.memory, keeps_gradients=engine.ranks.keeps_gradients)
            engine.stage, engine.gradients.before_loop = Stage.READY, None
        except BaseException:
            if engine.loop is loop:  # else a pass has left it, or a later step has begun before Python closed it
                engine.leave_loop()
            raise

    @eager
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; return the loss at w where a closure was run.

        Between two steps, the closure is called once a pass. After :meth:`passes`, or with a :meth:`first_step`
        pending, the passes have been made: the closure is not called, and the base steps from w. With neither passes
        nor closure, this is a plain step of the base, with a warning the first time.

        Args:
            closure: A function that only returns the loss, a mean over the batch: the gradients are cleared and the
                backward is run for it. Or the closure of ``torch.optim``, which does both: zero_grad, forward,
                backward, return the loss.

        Returns:
            The loss of the first pass: at w, or at w + e where that is the only pass. None without a closure.

        Raises:
            RuntimeError: Called inside the loop over :meth:`passes`; or gradients were accumulated before the
                closure, which the second pass would lose; or gradients are scaled where they must not be.
        """
        stage = self._engine.stage
        if closure is not None and stage in (Stage.IDLE, Stage.INCOMPLETE):
            return self._step_by(closure)
        if stage is Stage.IDLE:
            return self._plain_step()
        if stage not in (Stage.AFTER_FIRST_STEP, Stage.READY):
            raise out_of_order("step()", stage)
        self._check_scale()
        if stage is Stage.AFTER_FIRST_STEP:
            self._refuse_unreduced_gradients()
            self._engine.pass_gradients.end_pass(made=self._engine.gradients.any())
            self._check_cleared()
        self._check_gradients()
        try:
            if stage is Stage.AFTER_FIRST_STEP:
                if called_by_scaler():
                    self._engine.unscale_unperturbed()
                self._finish_classic()
            self._take_step()
        except BaseException:
            self.restore()
            raise
        return None

    @eager
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradient that a backward has left (the classic API).

        Until :meth:`second_step`, the weights are at w + e. If an exception comes in between, call :meth:`restore`.

        The second pass evaluates the same function as the first if the loop calls :meth:`zero_grad` right before the
        first forward. It then draws the random numbers that followed ``zero_grad()``, such as dropout masks, and
        starts from the state of ``model=`` at that forward. Without ``zero_grad()``, it draws the numbers that followed
        the last step, and starts from the state that the first pass has left; so it does with ``torch.compile``.
        :meth:`passes` needs no such care.

        Args:
            zero_grad: Clear the gradients for the second backward. Without it, clear them yourself.

        Raises:
            RuntimeError: Called twice, or inside a pass; or the method's passes do not fit the classic API.
        """
        self._begin("first_step()")
        self._begin_micro_batch(None, accumulate=False, is_first=True)
        check_classic(self.perturbation, single_pass=self._has_single_pass(), per_rank=self.per_rank)
        engine = self._engine
        try:
            engine.ranks.refuse_unreduced_gradients()
            engine.pass_gradients.begin_step()
            engine.pass_gradients.end_pass(made=engine.gradients.any())
            point = engine.point_after_first_pass()
            if self.cadence(engine.unscaled_view(self.cadence, point)):
                self._begin_perturbed_pass(point)
            else:
                engine.begin_second_pass_at_w()
            engine.stage = Stage.AFTER_FIRST_STEP
            if zero_grad:
                self.zero_grad()
            elif not engine.clearing_watched:
                engine.gradients.observe()
        except BaseException:
            self.restore()
            raise

    @eager
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights, and step with the gradient that the second backward has left (the classic API).

        Args:
            zero_grad: Clear the gradients after the step.

        Raises:
            RuntimeError: No :meth:`first_step` is pending.
        """
        if self._engine.stage is not Stage.AFTER_FIRST_STEP:
            raise RuntimeError(
                "second_step() was called before first_step(): there is no perturbation to undo. Call first_step() "
                "after the first backward, and second_step() after the second"
            )
        self.step()
        if zero_grad:
            self.zero_grad()
        self._engine.side_effects.expect_first_pass(in_step=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and discard passes that no step has followed (a loss scaler may skip it)."""
        super().zero_grad(set_to_none)
        for base in optimizers_of(self.base):
            if type(base).zero_grad is not Optimizer.zero_grad:  # it may clear more (gradients of each sample, ...)
                base.zero_grad(**({} if set_to_none else {"set_to_none": False}))  # some take no argument
        self._engine.gradients.mark_cleared()
        if self._engine.stage in (Stage.READY, Stage.INCOMPLETE, Stage.IDLE):
            self._engine.stage = Stage.IDLE
            self._follow_parameters()
            self._engine.side_effects.expect_first_pass()


show_signature(SAM.__init__, get_overloads(SAM.__init__)[0])
