"""Small networks with BatchNorm and dropout, and a check that a measurement leaves them unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.flatness import Objective

DOUBLE = torch.float64


def conv_net(seed: int = 0, dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    """Return convolutions with BatchNorm, whose running statistics are not the initial ones, and dropout."""
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


class SquareOnce(torch.autograd.Function):
    """x^2 without a second derivative, as attention kernels are."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Squares(nn.Module):
    """A linear layer and a function of its outputs."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(4, 3).double(), function

    def forward(self, x):
        return self.function(self.layer(x))


def images(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(11, 1, 5, 5, generator=g, dtype=dtype), torch.randint(3, (11,), generator=g)


def image_objective(net: nn.Module, **options: object) -> Objective:
    """Return the loss of a network over image batches of unequal sizes."""
    return Objective(net, images(next(net.parameters()).dtype), loss=F.cross_entropy, batch_size=4, **options)


def evaluated(net: nn.Module) -> Tensor:
    """Return the loss on the images in evaluation mode."""
    net.eval()
    with torch.no_grad():
        x, y = images(next(net.parameters()).dtype)
        return F.cross_entropy(net(x), y)


def estimated(net: nn.Module) -> Tensor:
    """Return the same with BatchNorm's statistics as the mean of those of the three batches, weighted by samples."""
    net.train()
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.eval()
    seen = 0
    with torch.no_grad():
        for x in images()[0].split(4):
            seen += len(x)
            for m in net.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.momentum = len(x) / seen  # 1 for the first batch, which replaces what was there
            net(x)
    return evaluated(net)


def relu_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def points(n: int = 20) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 4, generator=g, dtype=DOUBLE), torch.randint(3, (n,), generator=g)


def point_objective(net: nn.Module, **options: object) -> Objective:
    return Objective(net, points(), loss=F.cross_entropy, **options)


class FunctionOfWeights(nn.Module):
    """A model whose output is a function of a vector of weights, whatever the data."""

    def __init__(self, function, w: Tensor) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w)


def objective_of(function, w: Tensor) -> Objective:
    return Objective(FunctionOfWeights(function, w), (torch.zeros(1, 1), torch.zeros(1)), loss=lambda loss, _: loss)


def _bits(t: Tensor | None) -> bytes | None:
    return None if t is None else t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _state(model: nn.Module) -> list[object]:
    return [
        [(k, _bits(t), t.data_ptr(), t.requires_grad) for k, t in model.named_parameters()],
        [(k, _bits(t), t.data_ptr()) for k, t in model.named_buffers()],
        [_bits(p.grad) for p in model.parameters()],
        [(k, m.training, getattr(m, "momentum", None)) for k, m in model.named_modules()],
        _bits(torch.get_rng_state()),
    ]


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Assert that the block leaves weights, buffers, ``.grad``, modes and generator unchanged, even if it raises."""
    for model in models:
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        next(iter(model.children()), model).train(False)  # modes that differ, so that none is restored by chance
    before = [_state(model) for model in models]
    try:
        yield
    finally:
        assert [_state(model) for model in models] == before


class FailingLoss:
    """A loss that raises at its n-th call."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("broken on purpose")
        return F.cross_entropy(outputs, targets)
