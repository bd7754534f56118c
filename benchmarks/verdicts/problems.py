"""Real training runs that take a tenth of a second: small networks on two of scikit-learn's data sets; flatness."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

import steppe
from steppe.flatness import Budget, Objective, measure, normalized_logits

BUDGET = Budget(
    m=100, ascent_steps=5, pairs=8, probes=8, num_eigenvalues=1, density_probes=1, density_iterations=2, points=0
)
"""Small, for networks of 1,810 weights."""


@dataclass(frozen=True)
class Data:
    """Inputs and targets of a training and a test set."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A data set, a network and a metric; `sgd` and `sam` train it."""

    description: str
    load: Callable[[], Data]
    sizes: tuple[int, ...]
    """Widths of the layers."""
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], Tensor]
    lr: float
    rho: float
    epochs: int = 6
    batch_size: int = 32


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * (outputs.argmax(1) == targets).double().mean()


@cache
def _digits() -> Data:
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return Data((inputs[:600], targets[:600]), (inputs[600:], targets[600:]))


@cache
def _diabetes() -> Data:
    features, values = load_diabetes(return_X_y=True, scaled=False)
    inputs, targets = (torch.tensor(each, dtype=torch.float32) for each in (features, values[:, None]))
    inputs, targets = ((each - each[:300].mean(0)) / each[:300].std(0) for each in (inputs, targets))
    return Data((inputs[:300], targets[:300]), (inputs[300:], targets[300:]))


PROBLEMS: Mapping[str, Problem] = {
    "digits": Problem(
        "digits, test accuracy on 1,197 images", _digits, (64, 24, 10), F.cross_entropy, _accuracy, lr=0.5, rho=0.05
    ),
    "diabetes": Problem(
        "diabetes, test error of a regression on 142 patients",
        *(_diabetes, (10, 32, 1), F.mse_loss, F.mse_loss),
        lr=0.05,
        rho=0.2,
        epochs=12,
    ),
}


def train(problem: Problem, method: str, seed: int) -> float:
    """Train a network by "sgd" or "sam" and return its metric on the test set, both at equal compute.

    The runs of a seed have the same initial weights and order of samples.
    """
    return _metric(problem, _trained(problem, method, seed), problem.load().test)


def train_and_measure(problem: Problem, method: str, seed: int) -> dict[str, float]:
    """Train a network likewise and return all that a report has verdicts on: its test metric, gap and flatness."""
    model, data = _trained(problem, method, seed), problem.load()
    train, test = (_metric(problem, model, samples) for samples in (data.train, data.test))
    plain, normalized = (
        Objective(model, data.train, loss=loss) for loss in (problem.loss, normalized_logits(problem.loss))
    )
    flatness = measure(plain, BUDGET, normalized=normalized)
    return {"test": test, "gap": train - test, **{name: each.value for name, each in flatness.measures.items()}}


def _metric(problem: Problem, model: nn.Module, samples: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(problem.metric(model(samples[0]), samples[1]))


def _trained(problem: Problem, method: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    data, layers = problem.load(), [nn.Linear(*pair) for pair in zip(problem.sizes, problem.sizes[1:], strict=False)]
    model = nn.Sequential(*[module for layer in layers for module in (layer, nn.Tanh())][:-1])
    base = torch.optim.SGD(model.parameters(), lr=problem.lr)
    optimizer = steppe.SAM(base, rho=problem.rho, model=model) if method == "sam" else base
    (inputs, targets), n = data.train, len(data.train[1])
    for _ in range(problem.epochs // (2 if method == "sam" else 1)):
        for batch in torch.randperm(n).split(problem.batch_size):
            _step(optimizer, model, problem.loss, inputs[batch], targets[batch])
    return model


def _step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        return value

    optimizer.step(closure)
