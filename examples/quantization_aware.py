"""Quantization-aware training with SAM: perturb the rounded weights, as SAQ (arXiv 2111.12273) does, at 3 bits."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import steppe


class Rounded(torch.nn.Linear):
    """A linear layer with weights of a few bits: Q(weight) + offset, in the backward as if Q were the identity.

    A perturbation of ``weight`` would be rounded away, or become a whole step of Q. So SAM perturbs ``offset``, a
    parameter that stays 0, and its gradient at Q(weight) + e updates ``weight``.
    """

    def __init__(self, inputs, outputs, bits=3):
        """Make the layer."""
        super().__init__(inputs, outputs)
        self.offset, self.bits = torch.nn.Parameter(torch.zeros_like(self.weight)), bits

    def forward(self, x):
        """Multiply by the rounded weights."""
        step = self.weight.detach().abs().max() / (2 ** (self.bits - 1) - 1)
        rounded = (self.weight.detach() / step).round() * step
        return F.linear(x, self.weight + (rounded - self.weight).detach() + self.offset, self.bias)


def make(perturb="rounded", rho=0.2, seed=0, dtype=torch.float32):
    """Return a network of rounded layers and its optimizer."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(Rounded(64, 32), torch.nn.ReLU(), Rounded(32, 10)).to(dtype)
    offsets, weights, biases = ([getattr(model[i], name) for i in (0, 2)] for name in ("offset", "weight", "bias"))
    groups = [{"params": weights + biases}, {"params": offsets, "lr": 0.0}]  # trained by no step
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    only = (offsets if perturb == "rounded" else weights) + biases
    return model, steppe.variants.sam(base, rho=rho, model=model, only=only)


def train(steps=200, **options):
    """Train on handwritten digits; return the network, and the images and labels to test it on."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    model, optimizer = make(**options)
    for i in torch.randint(1440, (steps, 64), generator=torch.Generator().manual_seed(0)):
        optimizer.step(lambda i=i: F.cross_entropy(model(x[i]), y[i]))
    return model, x[1440:], y[1440:]


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is tiny
    for name, options in {"SGD": {"rho": 0.0}, "SAM": {"perturb": "latent"}, "SAQ": {}}.items():
        model, x, y = train(**options)
        print(f"{name}: test accuracy at 3 bits {(model(x).argmax(1) == y).float().mean():.1%}")
