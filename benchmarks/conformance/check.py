"""Measure one statement for one implementation."""

import warnings

from conformance.adapters.base import Adapter
from conformance.outcome import NotApplicable, Outcome


def check(peer: Adapter, id: str) -> dict[str, str]:
    """Measure a statement; ``status`` is "holds", "fails", "limitation" (documented) or "n/a"."""
    if id in peer.not_applicable:
        return {"status": "n/a", "reason": peer.not_applicable[id]}
    detail = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = peer.own_statements[id]() if id in peer.own_statements else _measure(peer, id)
    except NotApplicable as reason:
        return {"status": "n/a", "reason": str(reason)}
    except Exception as error:
        outcome = Outcome(False, type(error).__name__, "no error")
        detail["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    status = "holds" if outcome.holds else "fails"
    found = {"status": status, "measured": outcome.measured, "expected": outcome.expected}
    if not outcome.holds and id in peer.limitations:
        limitation = peer.limitations[id]
        found |= {"status": "limitation", "reason": limitation.summary, "link": limitation.link}
    return found | detail


def _measure(peer: Adapter, id: str) -> Outcome:
    from conformance.statements import STATEMENTS  # imports torch, which optax's environment does not have

    return STATEMENTS[id](peer)
