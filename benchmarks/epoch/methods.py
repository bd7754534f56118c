"""The methods of the benchmark, each with its arguments, and functions that take whole training steps with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from memory import Step, stepper
from steppe import SAM, closures, variants
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.methods._card import MethodCard
from steppe.methods.late_sam import LatePhase
from steppe.methods.random_sam import Bernoulli
from steppe.methods.registry import CARDS
from steppe.rules import Cadence, Point
from steppe.rules.periodic import Periodic

CLASSES = 10


@dataclass(frozen=True)
class Problem:
    """The network, the images, and the options of the computation."""

    batch: int
    width: int
    stem_stride: int
    device: str = "cpu"
    channels_last: bool = True
    amp: bool = False
    compile: bool = False
    graphs: bool = False

    def data(self) -> tuple[Tensor, Tensor]:
        """Return random images and labels, on the device."""
        images = torch.randn(self.batch, 1, 28, 28, device=self.device).to(memory_format=self._layout)
        return images, torch.randint(CLASSES, (self.batch,), device=self.device)

    def network(self) -> nn.Module:
        """Return a new network with the same weights at every call."""
        torch.manual_seed(0)
        network = PreActResNet18(self.width, num_classes=CLASSES, stem_stride=self.stem_stride)
        network = network.to(self.device).to(memory_format=self._layout)
        if self.compile:
            network.compile(dynamic=False)
        return InBfloat16(network) if self.amp else network

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


class InBfloat16(nn.Module):
    """A network that opens its own autocast region."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, in float32."""
        with torch.autocast(images.device.type, torch.bfloat16):
            logits: Tensor = self.inner(images)
        return logits.float()


@dataclass(frozen=True)
class Repeated:
    """A cadence that repeats its first steps, so that every timing spans a whole period."""

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    cadence: Cadence
    period: int

    def __call__(self, point: Point) -> bool:
        """Return True if the step perturbs."""
        return self.cadence(replace(point, step=point.step % self.period))


@dataclass(frozen=True)
class Method:
    """A method with its arguments, and the base that it is compared with."""

    name: str
    card: MethodCard
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the method."""
    momentum: float = 0.0
    """Momentum of the base, and of the base that it is compared with."""
    period: int = 1
    """The number of steps after which its passes repeat."""
    target: float | None = None
    """The highest acceptable time, in units of the base's time."""
    fraction: float | None = None
    """The fraction of the batch that computes the perturbation, by `closures.fraction`."""
    capturable: bool = False
    """True if the CUDA graph of one step is right for all steps."""

    @property
    def passes(self) -> float:
        """Planned passes per step."""
        arguments = self.arguments if self.fraction is None else {"fraction": self.fraction}
        passes = self.card.passes_with(**arguments)
        if passes is None:
            raise ValueError(f"{self.name}: its passes depend on the gradients, so there is no plan to compare with")
        return float(passes)

    def build_step(self, problem: Problem) -> Step:
        """Return a function that takes one training step, with its own network, optimizer and batch."""
        network, batch = problem.network(), problem.data()
        # a small learning rate, so that the weights, and with them the cost of a step, hardly change
        base = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=self.momentum, fused=problem.device == "cuda")
        arguments = {**self.arguments, **({"replay_rng": False} if problem.graphs else {})}
        if self.fraction is None:
            return stepper(self.card, base, network, _losses, batch, **arguments)
        (optimizer, *_) = self.card.example(base, network, **arguments)
        closure = closures.fraction(
            optimizer, lambda x, y: _losses(network(x), y).mean(), batch, fraction=self.fraction
        )
        return lambda: optimizer.step(closure)


def methods(problem: Problem) -> Sequence[Method]:
    """Return all methods, the cheaper ones first, with the defaults of their cards.

    AE-SAM is missing, because its passes depend on the gradients, and those of one batch are not representative.
    """
    saf = {"samples": problem.batch, "classes": CLASSES, "epochs_ago": 1, "start": 0}
    late = {"start": 0.75, "total_steps": 8}
    random = {"p": 0.5, "seed": 8, "period": 8}  # with this seed, four of eight steps perturb
    plain = {name: Method(CARDS[name].label, CARDS[name]) for name in CARDS}
    graphs = {name: replace(plain[name], capturable=True) for name in ("sam_on", "asam", "gsam")}
    return [
        SGD,
        MOMENTUM,
        MSAM,
        plain["rwp"],
        plain["arwp"],
        Method("SAF", _built_by(_saf, "saf"), saf),
        Method("LookSAM, every 5th step", CARDS["looksam"], {"interval": 5}, period=5),
        Method("SAM, every 5th step", _PERIODIC, {"interval": 5}, period=5),
        Method("SAM in the last quarter", _built_by(_late_sam, "late_sam"), late, period=8),
        QUARTER,
        Method("MESA", CARDS["mesa"], {"start": 0}),
        Method("RST, p = 0.5", _built_by(_random_sam, "random_sam"), random, period=8),
        plain["esam"],
        PLAIN_SAM,
        graphs["sam_on"],
        graphs["asam"],
        graphs["gsam"],
        plain["sampa"],
        plain["micro_batch_sam"],
        Method("Lookbehind, 2 ascent steps", CARDS["lookbehind_sam"], {"ascent_steps": 2}),
    ]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _base_alone(base: Optimizer, model: nn.Module, **_: Any) -> tuple[Any, ...]:
    return (base,)


def _periodic_sam(base: Optimizer, model: nn.Module, *, interval: int, **options: Any) -> tuple[Any, ...]:
    return (SAM(base, model=model, cadence=Periodic(interval), **options),)


def _late_sam(base: Optimizer, model: nn.Module, *, start: float, total_steps: int, **options: Any) -> tuple[Any, ...]:
    return (SAM(base, model=model, cadence=Repeated(LatePhase(start, total_steps), total_steps), **options),)


def _random_sam(
    base: Optimizer, model: nn.Module, *, p: float, seed: int, period: int, **options: Any
) -> tuple[Any, ...]:
    return (SAM(base, model=model, cadence=Repeated(Bernoulli(p, seed), period), **options),)


def _saf(base: Optimizer, model: nn.Module, **arguments: Any) -> tuple[Any, ...]:
    return (base, variants.saf(**arguments).to(next(model.parameters()).device))


def _built_by(build: Callable[..., tuple[Any, ...]], name: str, /, **changes: Any) -> MethodCard:
    """Return the card of a method that is built in another way."""
    return replace(CARDS[name], build_example=build, **changes)


_PERIODIC = _built_by(_periodic_sam, "sam", passes=lambda interval: 1 + 1 / interval)
_BASE = _built_by(_base_alone, "sam", passes=1.0, name="sgd", label="SGD")
SGD = Method("SGD", _BASE, capturable=True)
MOMENTUM = Method("SGD, momentum 0.9", _BASE, momentum=0.9, capturable=True)
PLAIN_SAM = Method("SAM", CARDS["sam"], target=2.02, capturable=True)
QUARTER = Method("SAM, quarter batch", CARDS["fraction_sam"], fraction=0.25, target=1.3, capturable=True)
MSAM = Method("MSAM", CARDS["msam"], momentum=0.9, target=1.05, capturable=True)
