"""The verdict in one sentence, and the words for a difference: what is not known is said as plainly as what is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from steppe.experiments.report.markup import Markup, element, join
from steppe.experiments.report.measured import Flatness
from steppe.experiments.specs import parse
from steppe.experiments.statistics import Estimate
from steppe.experiments.summary import Difference, Summary

__all__ = ["details", "headlines", "typographic", "word", "word_of"]

_KINDS: Mapping[str, str] = {"better": "good", "flatter": "good", "worse": "bad", "sharper": "bad"}
_UNMEASURED = "not measured"


def headlines(summary: Summary, flatness: Flatness) -> list[Markup]:
    """The verdict on generalisation and flatness: a sentence for those contenders of which the same can be said."""
    if not summary.rows:
        return [join("Nothing has been measured yet.")]
    if not summary.differences:
        return [join("There is one contender so far, and nothing to compare it with.")]
    if all(difference.gap.n == 1 for difference in summary.differences):
        return [join("One run of each contender gives ", word_of("no verdict"), ": it could have come out either way.")]
    alike: dict[tuple[str, str, str], list[Difference]] = {}
    for difference in summary.differences:
        flat = str(flatness.verdicts.get(difference.method, {}).get("verdict", _UNMEASURED))
        said = word(difference.test_accuracy, better=1), word(difference.gap, better=-1), flat
        alike.setdefault(said, []).append(difference)
    return [_headline(differences, *said) for said, differences in alike.items()]


def details(summary: Summary, flatness: Flatness) -> Iterator[str]:
    """The sentences with the numbers, the runs and the intervals, and every reservation, each once."""
    said = list(summary.notes())
    for verdict in flatness.verdicts.values():
        said += [str(sentence) for sentence in (verdict.get("sentence"), *verdict.get("notes", [])) if sentence]
    yield from (typographic(sentence) for sentence in dict.fromkeys([*said, *map(str, flatness.text)]))


def word(value: Estimate, *, better: int) -> str:
    """Say which way a difference goes, where `better` is the good sign."""
    return {None: "no verdict", 0: "not distinguishable", better: "better", -better: "worse"}[value.sign]


def word_of(text: str) -> Markup:
    """Set a verdict's word so that it is seen, in a colour as well as in words."""
    return element("b", text, class_=f"word {_KINDS.get(text, 'open')}")


def typographic(text: str) -> str:
    """Give numbers their minus sign.

    >>> typographic("SAM -1.20 points, [-2.00, -0.40], PreAct ResNet-18")
    'SAM −1.20 points, [−2.00, −0.40], PreAct ResNet-18'
    """
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


def _headline(differences: Sequence[Difference], accuracy: str, gap: str, flat: str) -> Markup:
    *most, last = (parse(difference.method).label for difference in differences)
    ours = f"{', '.join(most)} and {last}" if most else last
    against = f" against {parse(differences[0].reference).label}: "
    if accuracy == gap:
        general = join("test accuracy and generalization gap ", word_of(accuracy))
    else:
        general = join("test accuracy ", word_of(accuracy), ", generalization gap ", word_of(gap))
    what = ("minima " if most else "minimum ") if flat in _KINDS else "flatness "
    return join(ours, against, general, "; ", what, word_of(flat), ".")
