"""Measure the statements of the contract by what a user observes, one function each.

A function takes an adapter and measures. It uses no API of Steppe: ``session.step`` is the step in the implementation's
own documentation, and ``peer.plain`` the same loop without SAM. A statement that raises fails, with the error as its
measured value.
"""

from conformance.catalog import CATALOG
from conformance.statements import (
    checkpoints,
    gradients,
    mixed_precision,
    optimizer,
    perturbation,
    real_loops,
    restoring,
    side_effects,
    speed,
)
from conformance.statements.registry import FUNCTIONS

__all__ = [
    "STATEMENTS",
    "checkpoints",
    "gradients",
    "mixed_precision",
    "optimizer",
    "perturbation",
    "real_loops",
    "restoring",
    "side_effects",
    "speed",
]

STATEMENTS = {id: FUNCTIONS[id] for id in CATALOG}
"""The function of each statement, in the order of the catalog."""
