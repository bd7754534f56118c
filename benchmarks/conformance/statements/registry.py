"""The registry of the functions that measure the statements."""

from collections.abc import Callable

from conformance.adapters.base import Adapter
from conformance.outcome import Outcome

Measure = Callable[[Adapter], Outcome]

FUNCTIONS: dict[str, Measure] = {}
"""The function of each statement, by the statement's id."""


def statement(id: str) -> Callable[[Measure], Measure]:
    """Register the function that measures a statement of the catalog."""

    def register(measure: Measure) -> Measure:
        FUNCTIONS[id] = measure
        return measure

    return register
