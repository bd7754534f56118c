"""Measure the best rho of networks of several widths, with one rho for all layers and with the radii of steppe.mup.

    python benchmarks/mup.py            a few minutes of one core of a CPU
    python benchmarks/mup.py --draw     only draw the stored results again

A network 784 - n - n - 10 with ReLU, initialized in muP, is trained by SAM on 500 images of the packaged sample of
Fashion-MNIST. Each seed has its own images, weights and order. Both cases have muP's learning rates for SGD, so that
they differ in the radii only. The best rho of a width is the one whose mean test loss, of the last weights, is least.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import results
import steppe
from steppe.experiments.data.datasets import Dataset, load, normalize
from steppe.experiments.figures.drawing import Drawing, plot_mean
from steppe.experiments.figures.style import set_log_scale, styles_of

NAME = "mup"
WIDTHS = (8, 16, 32, 64)
RADII = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
SEEDS, IMAGES, BATCH, EPOCHS, LR = 3, 500, 50, 40, 0.1
BY_LAYER, ONE = "by_layer", "one_for_all"
TITLES = {ONE: "One rho for all layers", BY_LAYER: "Radii of steppe.mup"}


def network(width: int) -> nn.Sequential:
    """Return a network in muP: the weights of the output layer have a standard deviation that falls as 1 / width."""
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    model = nn.Sequential(nn.Flatten(), *layers)
    for layer in model:
        if isinstance(layer, nn.Linear):
            is_output = layer is model[-1]
            nn.init.normal_(layer.weight, std=WIDTHS[0] ** 0.5 / width if is_output else (2 / layer.in_features) ** 0.5)
            nn.init.zeros_(layer.bias)
    return model


def test_loss(data: Dataset, case: str, width: int, rho: float, seed: int, epochs: int) -> float:
    """Train a network and return its mean loss on the test images."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = network(width)
    chosen = torch.randperm(len(data.train.labels), generator=generator)[:IMAGES]
    x, y = normalize(data.train.images[chosen]), data.train.labels[chosen]
    groups = steppe.mup.parameter_groups(model, network(WIDTHS[0]), rho, lr=LR)
    radius = {} if case == BY_LAYER else {"sam_rho": rho}
    optimizer = steppe.SAM(torch.optim.SGD([{**group, **radius} for group in groups], lr=LR), model=model)
    for _ in range(epochs):
        for batch in torch.randperm(IMAGES, generator=generator).split(BATCH):

            def loss(batch: torch.Tensor = batch) -> torch.Tensor:
                return F.cross_entropy(model(x[batch]), y[batch])

            optimizer.step(loss)
    with torch.no_grad():
        return F.cross_entropy(model(normalize(data.test.images)), data.test.labels).item()


def measure(*, tiny: bool = False) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return the test losses of all seeds, by case, width and rho; the narrowest width is the same in both cases."""
    data = load("sample")
    found: dict[str, dict[str, dict[str, list[float]]]] = {ONE: {}, BY_LAYER: {}}
    for width in WIDTHS:
        for case, losses in found.items():
            if case == BY_LAYER and width == WIDTHS[0]:
                losses[str(width)] = found[ONE][str(width)]
                continue
            losses[str(width)] = {
                f"{rho:g}": [
                    test_loss(data, case, width, rho, seed, 1 if tiny else EPOCHS)
                    for seed in range(1 if tiny else SEEDS)
                ]
                for rho in (RADII[:2] if tiny else RADII)
            }
            print(f"width {width}, {case}: best rho {best(losses[str(width)]):g}", flush=True)
    return found


def standard_deviation(losses: list[float]) -> float:
    """Return the sample standard deviation over the seeds; 0 of one seed."""
    return stdev(losses) if len(losses) > 1 else 0.0


def best(by_rho: dict[str, list[float]]) -> float:
    """Return the rho with the least mean test loss."""
    return float(min(by_rho, key=lambda rho: mean(by_rho[rho])))


def plot(found: dict[str, dict[str, dict[str, list[float]]]]) -> Figure:
    """Draw the test loss over rho, one line for each width, and mark the best rho."""
    figure = Figure(figsize=(11.2, 4.2), layout="constrained")
    for axes, (case, title) in zip(figure.subplots(1, 2, sharey=True), TITLES.items(), strict=True):
        styles = styles_of([f"width {width}" for width in found[case]])
        for style, by_rho in zip(styles, found[case].values(), strict=True):
            rhos, means = [float(rho) for rho in by_rho], [mean(losses) for losses in by_rho.values()]
            plot_mean(axes, style, rhos, means, [standard_deviation(losses) for losses in by_rho.values()])
            axes.plot(best(by_rho), min(means), "o", color=style.color)
        set_log_scale(axes, horizontal=True)
        axes.set(title=title, xlabel=f"rho of width {WIDTHS[0]}" if case == BY_LAYER else "rho")
    figure.axes[0].set_ylabel("test loss")
    figure.axes[0].legend()
    return figure


def main() -> None:
    """Measure, store, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser, device="cpu")
    parser.add_argument("--draw", action="store_true", help="draw the stored results, without a new measurement")
    parser.add_argument("--images", type=Path, default=results.ROOT / "docs" / "images", help="folder of the figure")
    arguments = parser.parse_args()
    if not arguments.draw:
        torch.set_num_threads(1)
        print(results.save(NAME, measure(tiny=arguments.tiny), arguments))
    for result in results.load(NAME, arguments.results):
        _, svg = Drawing("mup_rho", partial(plot, result.data)).save(arguments.images)
        svg.unlink()  # the page shows the PNG


if __name__ == "__main__":
    main()
