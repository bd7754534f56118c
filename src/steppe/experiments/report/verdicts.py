"""The verdict in one sentence; unknown is stated as plainly as known."""

from collections.abc import Iterator, Mapping, Sequence

from steppe.experiments.analysis.summary import Difference, Summary, word
from steppe.experiments.analysis.verdicts import CAVEATS

KINDS: Mapping[str, str] = {"better": "good", "flatter": "good", "worse": "bad", "sharper": "bad"}
"""The class of a verdict's word on the page; every other word is "open"."""

_UNMEASURED, _NO_VERDICT = "not measured", "no verdict"


Headline = Sequence[tuple[str, str]]
"""A sentence as pairs: a text, and the verdict's word after it, which the page sets apart."""


def headlines(summary: Summary, *, measured: bool) -> list[Headline]:
    """Return the verdict on generalization and, if `measured`, flatness: one sentence for all methods it is true of."""
    if not summary.rows:
        return [[("Nothing has been measured yet.", "")]]
    if not summary.differences:
        return [[("There is one method so far, and nothing to compare it with.", "")]]
    if all(difference.gap.n == 1 for difference in summary.differences):
        return [[("One run of each method gives ", _NO_VERDICT), (": chance alone may explain the difference.", "")]]
    flatness = {verdict.method: verdict.word for verdict in summary.flatness}
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for difference in summary.differences:
        flat = flatness.get(str(difference.method), _NO_VERDICT if measured else _UNMEASURED)
        words = word(difference.test_accuracy, better=1), word(difference.gap, better=-1), flat
        groups.setdefault(words, []).append(difference)
    return [_headline(differences, *words) for words, differences in groups.items()]


def details(summary: Summary) -> Iterator[str]:
    """Yield the sentences with the numbers, the runs and the intervals, and every caveat, each once."""
    sentences = list(summary.notes())
    for verdict in summary.flatness:
        sentences += [verdict.sentence(), *verdict.notes()]
    sentences += CAVEATS if summary.flatness else []
    yield from dict.fromkeys(sentences)


def _headline(differences: list[Difference], accuracy: str, gap: str, flat: str) -> Headline:
    *most, last = (difference.method.label for difference in differences)
    ours = f"{', '.join(most)} and {last}" if most else last
    subject = f"{ours} against {differences[0].reference.label}: "
    minima = ("minima " if most else "minimum ") if flat in KINDS else "flatness "
    if accuracy == gap:
        parts = [(f"{subject}test accuracy and generalization gap ", accuracy)]
    else:
        parts = [(f"{subject}test accuracy ", accuracy), (", generalization gap ", gap)]
    return [*parts, (f"; {minima}", flat), (".", "")]
