"""What each method needs in memory beside its base, in units of the weights: within a step, and from step to step.

    python benchmarks/memory.py                     every method of the catalogue
    python benchmarks/memory.py gsam looksam        some
    python benchmarks/memory.py --json memory.json  for scripts/make_cards.py

Counts the bytes of every tensor that is alive, operation by operation, in the steps of a network whose activations are
negligible (two images, wide layers); SGD with momentum is the base. Bytes are exact, and do not depend on the machine.
"""

import argparse
import datetime
import gc
import json
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from steppe import closures
from steppe.methods._card import MethodCard
from steppe.methods.registry import CARDS

Step = Callable[[], object]
Losses = Callable[..., Tensor]

WIDTH, STEPS, SAMPLES = 1024, 6, 2
# So short a training has to show everything that a method does.
SHORT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sparse_sam": {"every": 2},
        "dynamic_sparse_sam": {"steps": STEPS, "every": 2},
        "late_sam": {"steps": STEPS},
        "aesam": {"steps": STEPS},
        "saf": {"samples": SAMPLES, "classes": WIDTH, "epochs_ago": 1, "start": 0},
        "mesa": {"start": 0},
    }
)


class Alive(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and look at what it returned."""
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Extra:
    """Beside the base, in units of the weights' size."""

    within: float
    """At the worst moment of a step."""
    between: float
    """From one step to the next."""


def model() -> nn.Module:
    """A wide network: 8 layers of the same size, and normalization layers for the methods that climb with them."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH), nn.ReLU()) for _ in range(8)]
    return nn.Sequential(*layers)


def stepper(
    method: MethodCard, base: Optimizer, network: nn.Module, losses: Losses, batch: Sequence[Tensor], **given: Any
) -> Step:
    """What takes a step with a method on a batch: for most, ``step`` with a plain closure.

    ``losses`` takes the network's outputs, and the tensors of a batch after the first, and gives a loss a sample.
    """
    optimizer, *parts = method.example(base, network, **given)

    def of(x: Tensor, *rest: Tensor) -> Tensor:
        return losses(network(x), *rest)

    return _STEPPERS.get(method.name, _plain)(optimizer, parts, network, losses, of, batch)


def _plain(optimizer, parts, network, losses, of, batch) -> Step:
    return lambda: optimizer.step(_closure(optimizer, lambda: of(*batch).mean()))


def _esam(optimizer, parts, network, losses, of, batch) -> Step:
    return lambda: optimizer.step(closures.selected(optimizer, of, batch, gamma=0.5))


def _fraction(optimizer, parts, network, losses, of, batch) -> Step:
    closure = closures.fraction(optimizer, lambda *part: of(*part).mean(), batch, fraction=0.5)
    return lambda: optimizer.step(closure)


def _micro_batches(optimizer, parts, network, losses, of, batch) -> Step:
    return lambda: closures.micro_batches(optimizer, lambda *part: of(*part).mean(), batch, m=len(batch[0]) // 2)


def _in_the_loss(optimizer, parts, network, losses, of, batch) -> Step:
    (term,) = parts
    epochs = iter(range(1_000_000))

    def step() -> None:
        epoch = next(epochs)

        def loss() -> Tensor:
            logits = network(batch[0])
            other = torch.arange(len(logits)) if hasattr(term, "samples") else batch[0]
            return losses(logits, *batch[1:]).mean() + term(logits, other, epoch=epoch)

        optimizer.step(_closure(optimizer, loss))

    return step


_STEPPERS = MappingProxyType(
    {"esam": _esam, "fraction_sam": _fraction, "micro_batches": _micro_batches}
    | dict.fromkeys(("saf", "mesa"), _in_the_loss)
)


def _closure(optimizer: Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return closure


def used(method: MethodCard | None) -> tuple[float, float]:
    """Peak within the steps, and what is kept after them, in units of the weights' size; of the base for None."""
    network = model()
    weights = sum(p.nbytes for p in network.parameters())
    base = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)
    batch = [torch.randn(SAMPLES, WIDTH)]

    def losses(outputs: Tensor) -> Tensor:
        return outputs.square().mean(1)

    alive = Alive()
    with alive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that two samples are few for SAF
        if method is None:
            step = _plain(base, (), network, losses, lambda x: losses(network(x)), batch)
        else:
            step = stepper(method, base, network, losses, batch, **SHORT.get(method.name, {}))
        for _ in range(STEPS):
            step()
        for p in network.parameters():
            p.grad = None
    gc.collect()
    return alive.peak / weights, alive.now / weights


def extra(method: MethodCard, base: tuple[float, float] | None = None) -> Extra:
    """What a method needs beside the base."""
    peak, kept = base if base is not None else used(None)
    own_peak, own_kept = used(method)
    return Extra(round(own_peak - peak, 2), round(own_kept - kept, 2))


def main() -> None:
    """Measure, print a table, write a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods of the catalogue; all, if none is named")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(CARDS):
        parser.error(f"no such method: {', '.join(sorted(unknown))}; the catalogue has {', '.join(CARDS)}")
    base, found = used(None), {}
    print(f"{'':<20}{'within':>8}{'between':>9}   a step, beside SGD with momentum; in units of the weights")
    for name in arguments.names or CARDS:
        found[name] = extra(CARDS[name], base)
        print(f"{name:<20}{found[name].within:>8.2f}{found[name].between:>9.2f}", flush=True)
    if arguments.json is not None:
        values = {
            "command": "python benchmarks/memory.py",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "torch": torch.__version__.partition("+")[0],
            "base": "SGD with momentum",
            "methods": {name: asdict(value) for name, value in found.items()},
        }
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
