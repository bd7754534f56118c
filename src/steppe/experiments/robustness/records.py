"""The measures as a comparison of methods records them: which ones, their directions and their units."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from steppe.experiments.robustness.corruptions import CORRUPTIONS
from steppe.experiments.robustness.measurement import measure
from steppe.experiments.storage.records import AVERAGED

PREFIX = "test_"
BITS = (4, 3)
"""At 8 bits, the accuracy of a network is nearly always that of its exact weights, and at 2 bits that of guessing."""


@dataclass(frozen=True)
class Measure:
    """A measure of the trained network: its name in records without the prefix, its heading, direction and unit."""

    name: str
    heading: str
    """In lines, for a column."""
    higher_is_better: bool = True
    unit: str = "%"


def final_measures(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    raise_if_stopped: Callable[[], None],
    *,
    mean: float = 0.0,
    std: float = 1.0,
) -> dict[str, float]:
    """Measure a trained network on test images, as fields of a record; its accuracy on clean ones is there already."""
    found = measure(model, images, labels, mean=mean, std=std, bits=BITS, raise_if_stopped=raise_if_stopped)
    return {PREFIX + name: value for name, value in found.items() if name != "accuracy"}


def measures_in(names: Iterable[str]) -> list[Measure]:
    """Return the measures among the names of a record, in an order for readers; a user's own corruptions are last.

    >>> [measure.name for measure in measures_in(["gap", "test_Brier score", "test_accuracy under fog"])]
    ['Brier score', 'accuracy under fog']
    """
    present = [n.removeprefix(PREFIX) for n in names if n.startswith(PREFIX) and not n.endswith(AVERAGED)]
    known = [measure for measure in _KNOWN if measure.name in present]
    bits = sorted((int(m[1]) for n in present if (m := re.fullmatch(r"accuracy at (\d+) bits", n))), reverse=True)
    rounded = map(_rounded, bits)
    listed = {measure.name for measure in known}
    under = "accuracy under "
    own = [Measure(n, n.removeprefix(under)) for n in present if n.startswith(under) and n not in listed]
    return [*known, *rounded, *own]


def _rounded(bits: int) -> Measure:
    return Measure(f"accuracy at {bits} bits", f"{bits}-bit\nweights")


_KNOWN = (
    Measure("accuracy under corruptions", "all\ncorrupted"),
    *(Measure(f"accuracy under {name}", name.replace("_and_", "/").replace("_", "\n")) for name in CORRUPTIONS),
    Measure("calibration error", "calibration\nerror", higher_is_better=False),
    Measure("negative log-likelihood", "negative\nlog-lik.", higher_is_better=False, unit=""),
    Measure("Brier score", "Brier\nscore", higher_is_better=False, unit=""),
)

IMAGE_MEASURES = (*_KNOWN, *map(_rounded, BITS))
"""What a comparison measures of every classifier of images at the end of its training."""
