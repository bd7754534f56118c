"""The words of verdicts, for the terminal, the files and the page."""

from typing import Final

from steppe.experiments.analysis.statistics import Estimate

NO_VERDICT: Final = "no verdict"
NOT_DISTINGUISHABLE: Final = "not distinguishable"
BETTER: Final = "better"
WORSE: Final = "worse"
FLATTER: Final = "flatter"
SHARPER: Final = "sharper"
MIXED: Final = "mixed"
INCONCLUSIVE: Final = "inconclusive"
NOT_MEASURED: Final = "not measured"

GOOD = (BETTER, FLATTER)
BAD = (WORSE, SHARPER)


def word(value: Estimate, *, better: int, words: tuple[str, str] = (BETTER, WORSE)) -> str:
    """Return the direction of a difference in a word, where `better` is the sign of the first of `words`.

    >>> word(Estimate(1, 0.5, None), better=1)
    'no verdict'
    """
    return {None: NO_VERDICT, 0: NOT_DISTINGUISHABLE, better: words[0], -better: words[1]}[value.sign]
