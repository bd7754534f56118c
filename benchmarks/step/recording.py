"""Measure what the record for ``optimizer.report()`` costs, beside a SAM step.

    python benchmarks/step/recording.py

The recorder counts every step and measures one perturbed step in 128. Two steps of one optimizer are timed in turns:
without the recorder, which then is an object whose methods do nothing, and with a measurement in every step. Their
difference is the cost of a measurement. It is large enough to be timed beside the noise of a shared machine, and a
128th of it falls on each step. What the recorder does in the other 127 steps takes microseconds; these calls are timed
by themselves.

The networks are the demo's ResNet-18, and one whose step is host-bound: twenty small linear layers with BatchNorm,
where a step takes as long as its calls from Python. Times are processor time with one thread of a CPU, otherwise wall
time; on a GPU after synchronization.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results
import steppe
from epoch.methods import Problem
from markdown_tables import row
from steppe._engine.recorder import _INTERVAL, Recorder
from timing import rotated, spread

Clock = Callable[[], float]


class Nothing(Recorder):
    """A recorder that records nothing."""

    def perturbation(self, *args: Any) -> None:
        """Do nothing."""

    def perturbed_gradient(self, *args: Any) -> None:
        """Do nothing."""

    def loss(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def count_step(self) -> None:
        """Do nothing."""

    def forget(self) -> None:
        """Do nothing."""


class EachStep(Recorder):
    """A recorder that measures every step."""

    def _is_due(self) -> bool:
        return True


def demo(tiny: bool, device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return the demo's network with a batch of images and labels."""
    problem = Problem(8, 2, 2, device=device) if tiny else Problem(64, 16, 2, device=device)
    return problem.network(), *problem.data()


def host_bound(tiny: bool, device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a network of 80 small tensors with a batch."""
    layers = [layer for _ in range(2 if tiny else 20) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    return nn.Sequential(*layers).to(device), torch.randn(4, 8, device=device), torch.arange(4, device=device)


NETWORKS = {
    "PreAct ResNet-18 of width 16, batch of 64": (demo, 1),
    "20 linear layers of 8 x 8, batch of 4": (host_bound, 20),
}


def measure(name: str, *, rounds: int, tiny: bool, device: str) -> dict[str, Any]:
    """Return the times of a step, of a measurement and of the recorder's calls in a step without one."""
    make, repeat = NETWORKS[name]
    model, x, y = make(tiny, device)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=1e-4), rho=0.05, model=model)
    clock = _clock(device)
    times: dict[str, list[float]] = {"off": [], "each step": []}
    recorders = {"off": Nothing(optimizer.base), "each step": EachStep(optimizer.base)}
    for turn in range(-2, rounds):
        for key in rotated(list(recorders), turn % 2):
            optimizer._engine.recorder = recorders[key]
            begin = clock()
            for _ in range(repeat):
                optimizer.step(lambda: F.cross_entropy(model(x), y))
            if turn >= 0:
                times[key].append((clock() - begin) / repeat)
    step, with_measurement = spread(times["off"], times["off"]), spread(times["each step"], times["off"])
    unmeasured = _seconds_of_calls(Recorder(optimizer.base), clock)
    measurement = max(with_measurement["ratio"] - 1, 0)
    return {
        "network": name,
        "rounds": rounds,
        "repeat": repeat,
        "interval": _INTERVAL,
        "step": step,
        "with_measurement": with_measurement,
        "unmeasured_seconds": unmeasured,
        "share": measurement / _INTERVAL + unmeasured / step["seconds"],
    }


def _seconds_of_calls(recorder: Recorder, clock: Clock, repeat: int = 1000) -> float:
    """Return the time of the recorder's calls in a step that it does not measure."""
    recorder.perturbed_steps = 1
    loss = torch.zeros(())
    begin = clock()
    for _ in range(repeat):
        recorder.loss(loss, is_perturbed=False)
        recorder.perturbation(list)
        recorder.loss(loss, is_perturbed=True)
        recorder.is_measuring()
        recorder.count_step()
        recorder.perturbed_steps = 1
    return (clock() - begin) / repeat


def _clock(device: str) -> Clock:
    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized if device == "cuda" else time.process_time


def render(result: results.Result) -> str:
    """Return the table."""
    head = ["network", "step, ms", "step with a measurement", "other steps, us", "all steps, %"]
    lines = [
        "**`optimizer.report()`**: a step without the recorder; the ratio of a step that is measured to it (median and "
        "range of the rounds); the recorder's time in a step that is not measured; and the share of all "
        "steps' time, one in 128 of which is measured.",
        "",
        row(head),
        row(["---"] + ["---:"] * (len(head) - 1)),
    ]
    for found in result.data["networks"]:
        ratio = found["with_measurement"]
        lines.append(
            row(
                [
                    found["network"],
                    f"{1e3 * found['step']['seconds']:.3g}",
                    f"{ratio['ratio']:.3f} ({ratio['ratio_least']:.2f} to {ratio['ratio_most']:.2f})",
                    f"{1e6 * found['unmeasured_seconds']:.2g}",
                    f"{100 * found['share']:.2g}",
                ]
            )
        )
    return "\n".join([*lines, "", result.source]) + "\n"


def main() -> None:
    """Measure, save the result and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 2 if args.tiny else args.rounds
    found = [measure(name, rounds=rounds, tiny=args.tiny, device=args.device) for name in NETWORKS]
    path = results.save("recording", {"networks": found}, args)
    print(render(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
