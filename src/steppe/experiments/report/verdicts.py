"""The verdict in one sentence, and the words for a difference: what is not known is said as plainly as what is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from steppe.experiments.analysis.statistics import Estimate
from steppe.experiments.analysis.summary import Difference, Summary
from steppe.experiments.analysis.verdicts import CAVEATS
from steppe.experiments.config.method_spec import parse
from steppe.experiments.report.markup import Markup, element, join

__all__ = ["details", "headlines", "typographic", "word", "word_of"]

_KINDS: Mapping[str, str] = {"better": "good", "flatter": "good", "worse": "bad", "sharper": "bad"}
_UNMEASURED, _NO_VERDICT = "not measured", "no verdict"


def headlines(summary: Summary, *, measured: bool) -> list[Markup]:
    """The verdict on generalization and, if `measured`, flatness: a sentence for all of which the same can be said."""
    if not summary.rows:
        return [join("Nothing has been measured yet.")]
    if not summary.differences:
        return [join("There is one method so far, and nothing to compare it with.")]
    if all(difference.gap.n == 1 for difference in summary.differences):
        return [join("One run of each method gives ", word_of(_NO_VERDICT), ": it could have come out either way.")]
    flatness = {verdict.method: verdict.word for verdict in summary.flatness}
    alike: dict[tuple[str, str, str], list[Difference]] = {}
    for difference in summary.differences:
        flat = flatness.get(difference.method, _NO_VERDICT if measured else _UNMEASURED)
        said = word(difference.test_accuracy, better=1), word(difference.gap, better=-1), flat
        alike.setdefault(said, []).append(difference)
    return [_headline(differences, *said) for said, differences in alike.items()]


def details(summary: Summary) -> Iterator[str]:
    """The sentences with the numbers, the runs and the intervals, and every reservation, each once."""
    said = list(summary.notes())
    for verdict in summary.flatness:
        said += [verdict.sentence(), *verdict.notes()]
    said += CAVEATS if summary.flatness else []
    yield from (typographic(sentence) for sentence in dict.fromkeys(said))


def word(value: Estimate, *, better: int) -> str:
    """Say which way a difference goes, where `better` is the good sign."""
    return {None: _NO_VERDICT, 0: "not distinguishable", better: "better", -better: "worse"}[value.sign]


def word_of(text: str) -> Markup:
    """Set a verdict's word so that it is seen, in a color as well as in words."""
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
