"""Capture of a step in a CUDA graph: one graph for each kind of step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from steppe._engine.cuda_graphs import is_capturing
from steppe._engine.engine import Engine
from steppe._engine.shared import Shared
from steppe._engine.slots import Option, Rule
from steppe.rules import Cadence, needs_gradient
from steppe.rules.periodic import Periodic

_EVERY_STEP = Periodic()


class GraphCapture:
    """The methods of :class:`steppe.SAM` for CUDA graphs."""

    cadence = Rule[Cadence](_EVERY_STEP)
    replay_rng = Option(True)
    _engine: Engine
    _recording = Shared(False)

    @property
    def perturbs_next(self) -> bool | None:
        """True if the next step perturbs; None if the cadence decides by the gradient at w."""
        self._engine.load_from_base()
        return None if needs_gradient(self.cadence) else bool(self.cadence(self._engine.point_of_step()))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Allow the capture of a step in a CUDA graph, with a cadence that reads only the step's number.

        The graph holds a step of one kind. Replay it only where :attr:`perturbs_next` is what it was at the capture.
        Call :meth:`replayed` after each replay but the first, because the capture itself counts as a step.

        Raises:
            RuntimeError: The cadence decides by the gradient at w.
        """
        if needs_gradient(self.cadence):
            raise RuntimeError(
                f"CUDA graph capture with {self.cadence}: it decides by the gradient at w, on the host, in the middle "
                "of the step. Take a cadence that reads only the step's number, or no graph"
            )
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def replayed(self) -> None:
        """Count a step taken by the replay of a CUDA graph; everything else that a step changes lies in tensors."""
        self._engine.recorder.count_replay(perturbed=bool(self.perturbs_next))
        self._engine.steps += 1

    def _check_capture(self, parameter: Tensor) -> None:
        """Refuse a capture whose replays would repeat what this step decides on the host.

        A rule that draws random numbers by the step's number draws the same ones at every replay.
        """
        if not is_capturing(parameter):
            return
        if self.cadence != _EVERY_STEP and not self._recording:
            raise RuntimeError(
                f"CUDA graph capture with {self.cadence}: it decides on the host, and every replay would repeat this "
                "step's decision. Capture a graph for each kind of step, in `with optimizer.recording():`, and replay "
                "the one for which optimizer.perturbs_next is what it was at the capture"
            )
        if self.replay_rng:
            raise RuntimeError(
                "CUDA graph capture with replay_rng=True: the states of the generators cannot be read or set in a "
                "graph. Give SAM replay_rng=False; the two passes then have different dropout masks"
            )
