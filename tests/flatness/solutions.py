"""Small networks with all that a look at the loss could spoil, and the proof that it spoils nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.flatness import Objective

DOUBLE = torch.float64


def conv_net(seed: int = 0, dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    """Convolutions with BatchNorm, whose running statistics are no longer those of the beginning, and dropout."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(3, 2, 2),
        nn.BatchNorm2d(2, momentum=0.3),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).to(dtype)
    for m in net:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return net


def images(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(11, 1, 5, 5, generator=g, dtype=dtype), torch.randint(3, (11,), generator=g)


def on_images(net: nn.Module, **options: object) -> Objective:
    """Its loss over batches of unequal sizes."""
    return Objective(net, images(next(net.parameters()).dtype), loss=F.cross_entropy, batch_size=4, **options)


def relu_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def points(n: int = 20) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 4, generator=g, dtype=DOUBLE), torch.randint(3, (n,), generator=g)


def on_points(net: nn.Module, **options: object) -> Objective:
    return Objective(net, points(), loss=F.cross_entropy, **options)


class Formula(nn.Module):
    """Any function of a vector of weights, as the loss of a model that has no use for data."""

    def __init__(self, of, w: Tensor) -> None:
        super().__init__()
        self.of, self.w = of, nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.w)


def formula(of, w: Tensor) -> Objective:
    return Objective(Formula(of, w), (torch.zeros(1, 1), torch.zeros(1)), loss=lambda loss, _: loss)


def _bits(t: Tensor | None) -> bytes | None:
    return None if t is None else t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _everything(model: nn.Module) -> list[object]:
    return [
        [(k, _bits(t), t.data_ptr(), t.requires_grad) for k, t in model.named_parameters()],
        [(k, _bits(t), t.data_ptr()) for k, t in model.named_buffers()],
        [_bits(p.grad) for p in model.parameters()],
        [(k, m.training, getattr(m, "momentum", None)) for k, m in model.named_modules()],
        _bits(torch.get_rng_state()),
    ]


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Demand that weights, buffers, ``.grad``, modes and the generator are the same afterwards, after an error too."""
    for model in models:
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        next(iter(model.children()), model).train(False)  # modes that differ, so that none is restored by chance
    before = [_everything(model) for model in models]
    try:
        yield
    finally:
        assert [_everything(model) for model in models] == before


class Breaks:
    """A loss that raises when it is asked for the n-th time."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("broken on purpose")
        return F.cross_entropy(outputs, targets)
