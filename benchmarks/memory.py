"""Measure the memory of each method beyond that of its base, in units of the weights' size.

    python benchmarks/memory.py                     all methods
    python benchmarks/memory.py gsam looksam        some
    python benchmarks/memory.py --json memory.json  for scripts/make_cards.py
    python benchmarks/memory.py --lora              fine-tuning of language models, for scripts/make_performance.py

The bytes of all live tensors are counted after each operation, in the steps of a network whose activations are
negligible (two images, wide layers), around SGD with momentum; methods for adapters train LoRA of rank 8 on its linear
layers, which needs PEFT. "Within" is the peak within a step, "between" the memory that is kept from step to step. The
number of bytes is exact, and does not depend on the machine.

``--lora`` counts what fine-tuning takes, whole and with LoRA, of models in the shapes of published ones and with random
weights: half an hour on two cores, without the kernels' arithmetic (see live_memory.py).
"""

import argparse
import datetime
import functools
import gc
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from live_memory import LiveMemory
from results import add_arguments, read, save
from steppe import closures
from steppe.methods._card import MethodCard
from steppe.methods.registry import CARDS

Step = Callable[[], object]
Losses = Callable[..., Tensor]

WIDTH, STEPS, SAMPLES = 1024, 6, 2


@dataclass(frozen=True)
class ExtraMemory:
    """Memory beyond that of the base, in units of the weights' size."""

    within: float
    """At the peak of a step."""
    between: float
    """From one step to the next."""


def model(width: int = WIDTH) -> nn.Module:
    """Return a wide network: 8 layers of the same size, with normalization layers for the methods that need them."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU()) for _ in range(8)]
    return nn.Sequential(*layers)


def with_adapters(network: nn.Module) -> nn.Module:
    """Return the network with LoRA on its linear layers, and all else frozen."""
    from peft import LoraConfig, get_peft_model

    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return get_peft_model(network, LoraConfig(r=8, target_modules=linear))


def base_of(network: nn.Module) -> Optimizer:
    """Return SGD with momentum around all that is trained."""
    return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-6, momentum=0.9)


def stepper(
    card: MethodCard, base: Optimizer, network: nn.Module, losses: Losses, batch: Sequence[Tensor], **arguments: Any
) -> Step:
    """Return a function that takes a step with a method on a batch.

    ``losses`` takes the network's outputs and the tensors of a batch after the first, and returns a loss per sample.
    """
    optimizer, *parts = card.example(base, network, **arguments)

    def evaluate(x: Tensor, *rest: Tensor) -> Tensor:
        return losses(network(x), *rest)

    if not parts:
        return _plain(optimizer, evaluate, batch)
    (part,) = parts
    if isinstance(part, nn.Module):
        return _with_term(optimizer, part, network, losses, batch)
    if part in _LOSSES:
        return _with_loss(optimizer, _LOSSES[part], network, losses, batch)
    return _CLOSURES[part](optimizer, evaluate, batch)


def _plain(optimizer: Optimizer, evaluate: Losses, batch: Sequence[Tensor]) -> Step:
    return lambda: optimizer.step(_closure(optimizer, lambda: evaluate(*batch).mean()))


def _selected(optimizer: Any, evaluate: Losses, batch: Sequence[Tensor]) -> Step:
    return lambda: optimizer.step(closures.selected(optimizer, evaluate, batch, gamma=0.5))


def _fraction(optimizer: Any, evaluate: Losses, batch: Sequence[Tensor]) -> Step:
    closure = closures.fraction(optimizer, lambda *part: evaluate(*part).mean(), batch, fraction=0.5)
    return lambda: optimizer.step(closure)


def _micro_batches(optimizer: Any, evaluate: Losses, batch: Sequence[Tensor]) -> Step:
    return lambda: closures.micro_batches(optimizer, lambda *part: evaluate(*part).mean(), batch, m=len(batch[0]) // 2)


def _with_loss(
    optimizer: Any, wrap: Callable[[Any, Losses], Losses], network: nn.Module, losses: Losses, batch: Sequence[Tensor]
) -> Step:
    """Return the step of a method that replaces the mean loss, a function of the network's outputs."""
    loss = wrap(optimizer, lambda outputs, *rest: losses(outputs, *rest).mean())
    return lambda: optimizer.step(_closure(optimizer, lambda: loss(network(batch[0]), *batch[1:])))


def _perturbed_on_its_square(optimizer: Any, loss: Losses) -> Losses:
    return closures.perturb_on(optimizer, lambda *outputs: loss(*outputs).square(), loss)


_LOSSES = MappingProxyType(
    {
        closures.functional: closures.functional,
        closures.hessian_diagonal: closures.hessian_diagonal,
        closures.perturb_on: _perturbed_on_its_square,
    }
)
_CLOSURES = MappingProxyType(
    {closures.selected: _selected, closures.fraction: _fraction, closures.micro_batches: _micro_batches}
)


def _with_term(
    optimizer: Optimizer, term: nn.Module, network: nn.Module, losses: Losses, batch: Sequence[Tensor]
) -> Step:
    """Return the step of a method that adds a term to the loss, of the samples' indices (SAF) or inputs (MESA)."""
    epochs = iter(range(1_000_000))

    def step() -> None:
        epoch = next(epochs)

        def loss() -> Tensor:
            logits = network(batch[0])
            other = torch.arange(len(logits)) if hasattr(term, "samples") else batch[0]
            return losses(logits, *batch[1:]).mean() + term(logits, other, epoch=epoch)

        optimizer.step(_closure(optimizer, loss))

    return step


def _closure(optimizer: Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return closure


def used(card: MethodCard | None, *, adapters: bool = False) -> tuple[float, float]:
    """Return the peak within the steps and the memory after them, in units of the weights' size; None is the base."""
    width = 2 * WIDTH if adapters else WIDTH  # frozen weights of a small network are copied: a forward may write them
    network = model(width)
    weights = sum(p.nbytes for p in network.parameters())
    network = with_adapters(network) if adapters else network
    base = base_of(network)
    batch = [torch.randn(SAMPLES, width)]

    def losses(outputs: Tensor) -> Tensor:
        return outputs.square().mean(1)

    memory = LiveMemory()
    with memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAF warns that two samples are few
        for p in network.parameters():
            p.detach()  # is counted, also where no step reads the weight itself
        if card is None:
            step = _plain(base, lambda x: losses(network(x)), batch)
        else:
            arguments = card.short_arguments(total_steps=STEPS, samples=SAMPLES, classes=width)
            step = stepper(card, base, network, losses, batch, **arguments)
        for _ in range(STEPS):
            step()
        for p in network.parameters():
            p.grad = None
    gc.collect()
    return memory.peak / weights, memory.now / weights


def extra(card: MethodCard) -> ExtraMemory:
    """Return the memory of a method beyond that of the base on the same network."""
    peak, kept = used_by_base(card.needs_adapters)
    own_peak, own_kept = used(card, adapters=card.needs_adapters)
    return ExtraMemory(round(own_peak - peak, 2), round(own_kept - kept, 2))


@functools.cache
def used_by_base(adapters: bool) -> tuple[float, float]:
    """Return what the base uses."""
    return used(None, adapters=adapters)


def measure_lora(arguments: argparse.Namespace) -> None:
    """Count what fine-tuning takes, save the result and print its tables."""
    from lora_memory.run import measure  # needs PEFT and Transformers
    from lora_memory.table import render

    data, versions = measure(tiny=arguments.tiny)
    print(render(read(save("memory_lora", data, arguments, **versions))))


def main() -> None:
    """Measure, print a table, write a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of methods; all, if none is given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the numbers to")
    parser.add_argument("--lora", action="store_true", help="count what fine-tuning of language models takes")
    add_arguments(parser, device="cpu")
    arguments = parser.parse_args()
    if arguments.lora:
        if arguments.names or arguments.json:
            parser.error("--lora takes no names and no --json: it counts its own methods, and writes to --results")
        measure_lora(arguments)
        return
    if unknown := set(arguments.names) - set(CARDS):
        parser.error(f"no such method: {', '.join(sorted(unknown))}; known are {', '.join(CARDS)}")
    found = {}
    print(f"{'':<20}{'within':>8}{'between':>9}   a step, beyond SGD with momentum, in units of the weights' size")
    for name in arguments.names or CARDS:
        found[name] = extra(CARDS[name])
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
