"""The interface for methods whose step is not SAM's two passes and one step of the base."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from steppe._engine.callers import called_by_scaler
from steppe._engine.gradients import Gradients
from steppe._engine.groups import trained_parameters
from steppe._engine.shared import share
from steppe._engine.signatures import show_constructor
from steppe.rules import Memory, Point
from steppe.sam import SAM, Pass


class OwnStepMethod(SAM):
    """A method with a step of its own.

    A subclass sets the class attributes, overrides the hooks, and builds its step of the tools below. It uses nothing
    else of SAM and its engine, so that their guarantees hold for every method: restored weights, side effects of one
    pass, checkpoints, skipped steps.

    Hooks, in the order in which they are called:

    - :meth:`reset`: transient state, before the first step and in a copy.
    - :meth:`step_passes`: the passes of :meth:`~steppe.SAM.passes` and ``step(closure)``.
    - :meth:`update_gradient`: g and g_s -> update gradient, where SAM's combination is called.
    - :meth:`after_classic_passes`: the end of the classic API's two passes.
    - :meth:`step_base`: the step, after the training loop has changed ``.grad`` (clipping).
    - :meth:`memory_template`: names and shapes of what a checkpoint holds beside the base's state.
    """

    hyperparameters: ClassVar[tuple[str, ...]] = ()
    """Names of attributes that a copy keeps, beyond those of SAM."""
    why_no_scaler: ClassVar[str] = ""
    """Why a loss scaler cannot unscale this method's gradients; empty if it can."""
    why_no_accumulation: ClassVar[str] = ""
    """Why ``passes(accumulate=True)`` and ``closures.micro_batches`` are refused; empty if they work."""
    why_no_first_step: ClassVar[str] = ""
    """Why the classic API is refused; empty if it works."""

    own_rules: ClassVar[tuple[str, ...]] = ()
    """Rules of SAM that are the method's own: neither arguments nor assigned later."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            show_constructor(cls, SAM, without=(*cls.own_rules, "per_rank"))

    def __init__(self, *args: Any, per_rank: bool = False, **kwargs: Any) -> None:
        if per_rank:
            self._check_per_rank()
        super().__init__(*args, **kwargs)

    @classmethod
    def refuse_own_rules(cls, arguments: Collection[str]) -> None:
        """Raise TypeError if arguments of the constructor are among :attr:`own_rules`."""
        if taken := [f"{name}=" for name in cls.own_rules if name in arguments]:
            raise TypeError(
                f"{cls.__name__} has a {' and a '.join(cls.own_rules)} of its own: leave {' and '.join(taken)} out"
            )

    # Hooks.

    def reset(self) -> None:
        """Set transient state. Called before the first step, and in a copy or an unpickled optimizer."""

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield the passes of one step, and leave the update gradient in ``.grad``. By default, SAM's.

        Each pass is made by a tool below and yielded once; the weights are at w when it is made and when it is over. A
        generator: what stands before the first ``yield`` runs when the step begins.

        Args:
            accumulate: Add the update gradient to the earlier ``.grad``.
        """
        yield from self.sam_passes(accumulate=accumulate)

    def update_gradient(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Return the update gradient of g, in ``point``, and g_s (None without a perturbation).

        By default, that of the combination. Called by :meth:`combine`; a method that keeps something of both gradients
        does so here, because rules are stateless.
        """
        return self.combination(point, perturbed)

    def after_classic_passes(self) -> None:
        """Called when ``second_step()`` has written the update gradient to ``.grad``, before the base steps."""

    def step_base(self) -> bool:
        """Step from w with the gradient in ``.grad``; return False if the step was skipped on the host.

        By default, one step of the base, :meth:`step_base_once`. It leaves the weights at the new w. If it raises after
        a perturbation, the weights are restored to w, but not the base's state: change as little as possible after
        the base has stepped.
        """
        return self.step_base_once()

    def memory_template(self) -> Memory:
        """Return :attr:`memory` filled with zeros: torch.distributed.checkpoint needs names and shapes in advance."""
        return {}

    # Tools: passes.

    def sam_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield SAM's passes by the rules of this optimizer, then write the update gradient."""
        return super()._step_passes(accumulate=accumulate)

    def displaced_pass(self, displace: Callable[[], None], *, is_last: bool, is_perturbed: bool = False) -> Pass:
        """Return a step's first pass at another point than w.

        Args:
            displace: Displaces the weights, by :meth:`displace` or :meth:`perturb`.
            is_last: True if this pass gives the update gradient.
            is_perturbed: True if the point is a perturbation for the reader of ``Pass.is_perturbed``.
        """
        return Pass(
            self._engine,
            partial(self._begin_displaced, displace),
            is_first=True,
            is_last=is_last,
            is_perturbed=is_perturbed,
        )

    def perturbed_pass(self, point: Point) -> Pass:
        """Return a step's second pass, at w + e(point). It starts from the side effects of the first one."""
        begin = partial(self._begin_perturbed_pass, point)
        return Pass(self._engine, begin, is_first=False, is_last=True, is_perturbed=True)

    def _begin_displaced(self, displace: Callable[[], None]) -> None:
        displace()
        self._engine.drop_cached_weights()
        self._engine.side_effects.begin_first_pass([p for p, _ in self._engine.displaced()])
        self._engine.watch_displaced()

    # Tools: points and displacements.

    def trained_parameters(self) -> list[Tensor]:
        """Return the trainable parameters, each once."""
        return trained_parameters(self.base)

    def point(self, parameters: list[Tensor] | None = None, gradients: list[Tensor] | None = None) -> Point:
        """Return the point at the current weights; by default, with every parameter that has a gradient."""
        return self._engine.point(parameters, gradients)

    def displace(self, parameters: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor]) -> None:
        """Displace weights by alpha * direction, alpha 0-dim, until the end of the pass; for :meth:`displaced_pass`."""
        self._engine.displace(parameters, alpha, direction)

    def perturb(self, point: Point) -> None:
        """Displace weights by e(point) until the end of the pass; for :meth:`displaced_pass`."""
        self._engine.perturb(point, self.perturbation)
        self._engine.recorder.perturbation(self._engine.displaced)

    @property
    def is_measuring(self) -> bool:
        """True if this step is one of those that :meth:`steppe.SAM.report` measures."""
        return self._engine.recorder.is_measuring()

    def record_displacement(self, parameters: Sequence[Tensor], e: Tensor, w: Tensor) -> None:
        """Record that w, no parameter of the optimizer, was perturbed by e, for the report of these parameters' group.

        Called between a perturbed pass and the next one, if :attr:`is_measuring`.
        """
        self._engine.recorder.add_displacement(parameters, e, w)

    def forget_perturbation(self) -> None:
        """Forget the perturbation of the last pass: its gradient is not for :meth:`combine`."""
        self._engine.forget_perturbation()

    # Tools: gradients, the base's step, and what lasts from step to step.

    @property
    def gradients(self) -> Gradients:
        """Read and write ``.grad``; writing keeps the mark of a pass that was not finite."""
        return self._engine.gradients

    def combine(self) -> None:
        """Write the update gradient to ``.grad``, by :meth:`update_gradient`."""
        self._combine()

    def step_base_once(self) -> bool:
        """Step the base with the gradient in ``.grad``; return False if the host skipped the step as not finite."""
        return super()._step_base()

    @property
    def memory(self) -> dict[Tensor, dict[str, Tensor]]:
        """This method's tensors by parameter, which last from step to step and are saved in checkpoints."""
        return self._engine.memory.setdefault(self._name, {})

    @property
    def micro_batch(self) -> int:
        """Number of micro-batches of this step before this one, where each has a perturbation of its own."""
        return self._engine.micro_batches.number

    @property
    def steps_taken(self) -> int:
        """Number of steps taken before this one."""
        return self._engine.steps

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, but only once for each kind of warning."""
        self._engine.warn_once(kind, message)

    def refuse(self, what: str, why: str) -> NoReturn:
        """Raise RuntimeError: ``what`` with this method does not work, because ``why``."""
        raise RuntimeError(f"{what} with {self._name}: {why}")

    # The hooks' connection to SAM's own step.

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.hyperparameters}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name = type(self).__name__  # not read later: an object that proxies this one has a class of its own
        before = set(vars(self))
        self.reset()
        share(self, (vars(self).keys() - before) | (before & set(self.hyperparameters)))

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights, as :meth:`steppe.SAM.first_step` does.

        Raises:
            RuntimeError: The method does not support the classic API.
        """
        if self.why_no_first_step:
            self.refuse("first_step()", f"{self.why_no_first_step}. Use step(closure) or passes()")
        super().first_step(zero_grad)

    def passes(self, *, accumulate: bool = False, loss_weight: float | None = None) -> Iterator[Pass]:
        """Return the passes of a step, as :meth:`steppe.SAM.passes` does.

        Raises:
            RuntimeError: ``accumulate`` with a method that does not support it.
        """
        if (accumulate or loss_weight is not None) and self.why_no_accumulation:
            self.refuse(
                "passes(accumulate=True)" if accumulate else "a perturbation for each micro-batch",
                f"{self.why_no_accumulation}. Run all micro-batches inside each pass",
            )
        return super().passes(accumulate=accumulate, loss_weight=loss_weight)

    def _step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        return self.step_passes(accumulate=accumulate)

    def _combine(self) -> None:
        self._engine.combine(self.combination, self.update_gradient)

    def _finish_classic(self) -> None:
        super()._finish_classic()
        self.after_classic_passes()

    def _step_base(self) -> bool:
        with self._engine.weights_restored_on_exception():
            return self.step_base()

    def _check_per_rank(self) -> None:
        raise ValueError(
            f"per_rank=True with {type(self).__name__}, whose passes are its own. Leave it out, and all ranks "
            "share one perturbation, as one process would"
        )

    def _make_memory_template(self) -> Memory:
        return self.memory_template()

    def _loss_scale(self, parameter: Tensor) -> Tensor | None:
        scale = super()._loss_scale(parameter)
        if scale is not None:
            self._refuse_scaler()
        return scale

    def _check_scale(self) -> None:
        if called_by_scaler():
            self._refuse_scaler()
        super()._check_scale()

    def _refuse_scaler(self) -> None:
        if self.why_no_scaler:
            why = f"{self.why_no_scaler}. Train in bfloat16, which needs no scaler, or in float32"
            self.refuse("scaler.step(optimizer)", why)
