"""The methods: methods of the catalogue, and how each takes whole training steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from memory import Step, stepper
from steppe import SAM, closures, variants
from steppe.experiments.models.preact_resnet import preact_resnet18
from steppe.methods._card import MethodCard
from steppe.methods.late_sam import LatePhase
from steppe.methods.random_sam import Bernoulli
from steppe.methods.registry import CARDS
from steppe.rules import Cadence, Point
from steppe.rules.periodic import Periodic

CLASSES = 10


@dataclass(frozen=True)
class Problem:
    """What is trained, and how it is computed."""

    batch: int
    width: int
    stem_stride: int
    device: str = "cpu"
    channels_last: bool = True
    amp: bool = False
    compile: bool = False
    graphs: bool = False

    def data(self) -> tuple[Tensor, Tensor]:
        """Random images and labels, on the device."""
        images = torch.randn(self.batch, 1, 28, 28, device=self.device).to(memory_format=self._layout)
        return images, torch.randint(CLASSES, (self.batch,), device=self.device)

    def network(self) -> nn.Module:
        """A new network, always the same one."""
        torch.manual_seed(0)
        made = preact_resnet18(self.width, num_classes=CLASSES, stem_stride=self.stem_stride)
        made = made.to(self.device).to(memory_format=self._layout)
        if self.compile:
            made.compile(dynamic=False)
        return InBfloat16(made) if self.amp else made

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


class InBfloat16(nn.Module):
    """A network that computes under autocast, whoever calls it."""

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
    """A cadence whose first steps come again and again, so that every timing has a whole period."""

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    cadence: Cadence
    period: int

    def __call__(self, point: Point) -> bool:
        """Return whether to climb."""
        return self.cadence(replace(point, step=point.step % self.period))


@dataclass(frozen=True)
class Method:
    """A method at one setting."""

    name: str
    method: MethodCard
    given: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the method."""
    momentum: float = 0.0
    """Of the base, and of what it is compared with."""
    period: int = 1
    """After how many steps its passes repeat."""
    target: float | None = None
    """How many times the base's time it may take."""
    fraction: float | None = None
    """The share of the batch that climbs, by `closures.fraction`."""
    capturable: bool = False
    """Whether a CUDA graph of one step is right for all of them."""

    @property
    def passes(self) -> float:
        """Planned passes a step."""
        given = self.given if self.fraction is None else {"fraction": self.fraction}
        cost = self.method.cost_with(**given)
        if cost is None:
            raise ValueError(
                f"{self.name}: the gradients decide what a step costs, so there is no plan to compare with"
            )
        return float(cost)

    def step(self, problem: Problem) -> Step:
        """What takes one training step: a network, an optimizer and a batch of its own."""
        network, batch = problem.network(), problem.data()
        base = torch.optim.SGD(  # a small step, so that the last one costs what the first does
            network.parameters(), lr=1e-4, momentum=self.momentum, fused=problem.device == "cuda"
        )
        given = {**self.given, **({"replay_rng": False} if problem.graphs else {})}
        if self.fraction is None:
            return stepper(self.method, base, network, _losses, batch, **given)
        (optimizer, *_) = self.method.example(base, network, **given)
        closure = closures.fraction(
            optimizer, lambda x, y: _losses(network(x), y).mean(), batch, fraction=self.fraction
        )
        return lambda: optimizer.step(closure)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _alone(base: Optimizer, model: nn.Module, **_: Any) -> tuple[Any, ...]:
    return (base,)


def _every(base: Optimizer, model: nn.Module, *, k: int, **options: Any) -> tuple[Any, ...]:
    return (SAM(base, model=model, cadence=Periodic(k), **options),)


def _late(base: Optimizer, model: nn.Module, *, start: float, steps: int, **options: Any) -> tuple[Any, ...]:
    return (SAM(base, model=model, cadence=Repeated(LatePhase(start, steps), steps), **options),)


def _randomly(
    base: Optimizer, model: nn.Module, *, p: float, seed: int, period: int, **options: Any
) -> tuple[Any, ...]:
    return (SAM(base, model=model, cadence=Repeated(Bernoulli(p, seed), period), **options),)


def _saf(base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
    return (base, variants.saf(**given).to(next(model.parameters()).device))


def _with(name: str, make: Callable[..., tuple[Any, ...]], passes: Any = None) -> MethodCard:
    """A method of the catalogue that is made in another way."""
    method = CARDS[name]
    return replace(method, make=make, passes=method.passes if passes is None else passes)


_BASE = replace(_with("sam", _alone, passes=1.0), name="sgd", label="SGD")
SGD = Method("SGD", _BASE, capturable=True)
MOMENTUM = Method("SGD, momentum 0.9", _BASE, momentum=0.9, capturable=True)
SHARP = Method("SAM", CARDS["sam"], target=2.02, capturable=True)
QUARTER = Method("SAM, a quarter climbs", CARDS["fraction_sam"], fraction=0.25, target=1.3, capturable=True)
MSAM = Method("MSAM", CARDS["msam"], momentum=0.9, target=1.05, capturable=True)


def everybody(problem: Problem) -> Sequence[Method]:
    """All methods, the cheaper ones first; those of the catalogue have its defaults.

    AE-SAM is missing: the gradients decide what it costs, and those of one batch say nothing.
    """
    saf = {"samples": problem.batch, "classes": CLASSES, "epochs_ago": 1, "start": 0}
    # of the eight steps drawn with this seed, four climb
    randomly = {"p": 0.5, "seed": 8, "period": 8}
    plain = {name: Method(CARDS[name].label, CARDS[name]) for name in CARDS}
    graphs = {name: replace(plain[name], capturable=True) for name in ("sam_on", "asam", "gsam")}
    return [
        SGD,
        MOMENTUM,
        MSAM,
        plain["rwp"],
        Method("SAF", _with("saf", _saf), saf),
        Method("LookSAM, k = 5", CARDS["looksam"], {"k": 5}, period=5),
        Method("SAM at every 5th step", _with("sam", _every, passes=lambda k: 1 + 1 / k), {"k": 5}, period=5),
        Method("Late SAM, the last quarter", _with("late_sam", _late), {"start": 0.75, "steps": 8}, period=8),
        QUARTER,
        Method("MESA", CARDS["mesa"], {"start": 0}),
        Method("RST, p = 0.5", _with("random_sam", _randomly), randomly, period=8),
        plain["esam"],
        SHARP,
        graphs["sam_on"],
        graphs["asam"],
        graphs["gsam"],
        plain["sampa"],
        plain["micro_batch_sam"],
        Method("Lookbehind, k = 2", CARDS["lookbehind_sam"], {"k": 2}),
    ]
