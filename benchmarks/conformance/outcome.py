"""The outcome of a statement, and the exceptions to it that an adapter declares."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The outcome of a statement, with the measured and the expected value, both short."""

    holds: bool
    measured: str
    expected: str


@dataclass(frozen=True)
class Limitation:
    """A limitation stated in a peer's own documentation: a summary, and a link to it."""

    summary: str
    link: str


class NotApplicable(Exception):  # noqa: N818 - an outcome, not an error
    """The statement has no meaning for this implementation; the message is the reason."""
