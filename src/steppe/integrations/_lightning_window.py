"""Record the micro-batches of a step in Lightning's automatic optimization, so that further passes can repeat them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steppe._engine.closure import InPlaceWrites
from steppe._engine.generators import Generators
from steppe._engine.groups import parameters_of
from steppe._engine.model_state import ModelState
from steppe.integrations._batches import named_tensors, with_own_containers
from steppe.integrations._lightning_package import pl
from steppe.integrations._pass_losses import StepLosses
from steppe.sam import SAM, Pass


class MicroBatch(NamedTuple):
    """The arguments of one ``training_step``, the generators' states before it, and its share of the step's loss."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: InPlaceWrites | None
    """Notices writes into the batch, in the first step only."""
    generators: dict[str | torch.device, Any] | None
    loss: Tensor | None


class AccumulationWindow:
    """Record the micro-batches of a step in its first pass, and repeat them in the further ones."""

    def __init__(self, sam: SAM, trainer: "pl.Trainer") -> None:
        self._sam, self._trainer = sam, trainer
        self._generators = Generators(p.device for p in parameters_of(sam.base))
        self._buffers = ModelState(sam.model, parameters_of(sam.base)) if sam.model is not None else None
        self._micro_batches: list[MicroBatch] = []
        self._latest: MicroBatch | None = None
        self.losses = StepLosses()
        """The losses of the last step, for the log."""
        self.uninstall()  # an error in a finder has ended an earlier fit without any hook
        strategy = trainer.strategy
        self._training_step, self._backward = strategy.training_step, strategy.backward
        # Lightning calls the module through these methods, with batches that are on their device, also under DDP and
        # in the trials of its finders. Hooks of the callback would not get all arguments of training_step, and the
        # finders replace the list of callbacks.
        strategy.training_step = self._record  # type: ignore[method-assign]
        strategy.backward = self._backward_and_add  # type: ignore[method-assign]

    def uninstall(self) -> None:
        """Remove the recording from the strategy."""
        for name in ("training_step", "backward"):
            vars(self._trainer.strategy).pop(name, None)

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        trainer, generators = self._trainer, None
        self._clear_if_first()
        if trainer.accumulate_grad_batches > 1:
            if not self._micro_batches and self._buffers is not None:
                self._buffers.save()
            generators = self._generators.save()
        own_args, own_kwargs = with_own_containers((args, kwargs))  # training_step may change what it gets
        watched = self._sam._engine.closure_watched
        writes = None if watched else InPlaceWrites(_tensors_in(args), "training_step")
        output = self._training_step(*args, **kwargs)
        loss = self._share_of_loss(output)
        self._latest = MicroBatch(own_args, own_kwargs, writes, generators, None if loss is None else loss.detach())
        return output

    def _backward_and_add(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = self._backward(*args, **kwargs)
        if self._latest is not None:  # None in a further pass
            self._micro_batches.append(self._latest)
            self._latest = None
        return loss

    def _clear_if_first(self) -> None:
        if self._trainer.fit_loop.batch_idx % self._trainer.accumulate_grad_batches == 0:
            self.clear()

    def has_earlier(self) -> bool:
        """Return True if Lightning has run micro-batches of this step already, at w."""
        self._clear_if_first()
        return bool(self._micro_batches)

    def clear(self) -> None:
        """Release the micro-batches."""
        self._micro_batches.clear()

    def end_first_pass(self, sam_pass: Pass) -> None:
        """Store the loss of the first pass."""
        self.losses = StepLosses()
        self.losses.add(sam_pass, _sum(micro.loss for micro in self._micro_batches))

    def repeat_all(self, sam_pass: Pass) -> None:
        """Run a further pass over all micro-batches of the step."""
        self.losses.add(sam_pass, _sum(self._repeat()))

    def repeat_earlier(self) -> None:
        """Run the micro-batches before the last again, if the first pass is at w + e."""
        now = self._generators.save()
        losses = self._repeat(last_follows=True)
        self._generators.restore(now)
        self._micro_batches = [
            micro._replace(loss=loss) for micro, loss in zip(self._micro_batches, losses, strict=True)
        ]

    def _repeat(self, *, last_follows: bool = False) -> list[Tensor | None]:
        """Run the micro-batches again from the same buffers and generator states; return their losses."""
        strategy, losses = self._trainer.strategy, []
        if self._buffers is not None and self._micro_batches and self._micro_batches[0].generators is not None:
            self._buffers.restore()
        for micro in self._micro_batches:
            is_last = micro is self._micro_batches[-1] and not last_follows
            with nullcontext() if is_last else _unsynchronized(strategy):
                if micro.generators is not None and self._sam.replay_rng:
                    self._generators.restore(micro.generators)
                if micro.writes is not None:
                    micro.writes.begin_further_pass(_tensors_in(micro.args))
                args, kwargs = with_own_containers((micro.args, micro.kwargs))
                loss = self._share_of_loss(self._training_step(*args, **kwargs))
                if micro.writes is not None:
                    micro.writes.check(self._sam._engine)
                losses.append(None if loss is None else loss.detach())
                if loss is not None:
                    strategy.backward(loss, self._sam)
        return losses

    def _share_of_loss(self, output: Any) -> Tensor | None:
        """Return the share of a micro-batch in the loss of the step."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        return loss / self._trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None


def _tensors_in(args: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the arguments of ``training_step``, whose first is the batch, with their names."""
    return (pair for value in args for pair in named_tensors(value, "batch"))


def _sum(losses: Iterable[Tensor | None]) -> Tensor | None:
    present = [loss for loss in losses if loss is not None]
    return torch.stack(present).sum() if present else None


def _unsynchronized(strategy: Any) -> AbstractContextManager[Any]:
    """Let DDP average at the last micro-batch only, as Lightning does."""
    parallel = isinstance(strategy, pl.strategies.ParallelStrategy)
    return strategy.block_backward_sync() if parallel else nullcontext()
