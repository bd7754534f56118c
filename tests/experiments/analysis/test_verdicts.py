"""What may be said of crafted measurements: the sign of a difference, the words, the sentences, their lack."""

import io
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from rich.console import Console

from steppe.experiments.analysis.statistics import t_quantile
from steppe.experiments.analysis.verdicts import Pairing, Verdict, compare
from steppe.flatness import FAMILIES, Density, Flatness, Measure

RAW, ADAPTIVE = ("sharpness", "trace"), ("adaptive_sharpness", "adaptive_trace")


def flat(**values: float) -> Flatness:
    nothing = torch.zeros(1, dtype=torch.float64)
    measures = {name: Measure(value) for name, value in values.items()}
    return Flatness({}, measures, nothing, nothing, Density(nothing[None], nothing[None], 1), None, None, 0.0)


def verdict(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> Verdict:
    """Of values by seed."""
    sides = (
        [flat(**dict(zip(of, run, strict=True))) for run in zip(*of.values(), strict=True)] for of in (ours, theirs)
    )
    (found,) = compare([Pairing("sam", "sgd", ("SAM", "SGD"), list(zip(*sides, strict=True)))])
    return found


LOW, HIGH, SPREAD = (1.0, 1.1, 0.9), (2.0, 2.1, 1.9), (0.0, 1.0, 5.0)
AT_TWO = (2.0, 2.0, 2.0)


def judged(raw: Sequence[Sequence[float]], adaptive: Sequence[Sequence[float]]) -> Verdict:
    """The reference is at 2 everywhere."""
    names = [*RAW[: len(raw)], *ADAPTIVE[: len(adaptive)]]
    return verdict(dict(zip(names, [*raw, *adaptive], strict=True)), dict.fromkeys(names, AT_TWO))


def test_a_difference_is_ours_minus_theirs_and_lower_is_flatter() -> None:
    found = judged([LOW, (3.0, 3.1, 2.9)], [SPREAD])
    assert [row.word for row in found.rows] == ["flatter", "sharper", "not distinguishable"]
    sharper = found.rows[0].difference, found.rows[1].difference
    assert [d.mean for d in sharper] == pytest.approx([-1.0, 1.0])
    # the standard deviation is 0.1, and so is the smallest difference between two of the numbers
    assert sharper[0].half_width == pytest.approx(t_quantile(2, 3) * math.sqrt((0.01 + 0.01 / 6) / 3))
    assert (found.rows[0].ours.mean, found.rows[0].reference.mean) == pytest.approx((1.0, 2.0))
    assert found.runs == 3


def test_differences_are_paired_by_run() -> None:
    # each run's own level is far larger than the difference
    found = verdict({"trace": (10.0, 20.0, 30.0)}, {"trace": (11.0, 21.1, 30.9)})
    assert found.rows[0].word == "flatter"
    other = verdict({"trace": (10.0, 20.0, 30.0)}, {"trace": (21.1, 30.9, 11.0)})
    assert other.rows[0].word == "not distinguishable"


@pytest.mark.parametrize(
    ("raw", "adaptive", "words"),
    [
        ([LOW, LOW], [LOW, LOW], ("flatter", "flatter", "flatter")),
        ([LOW, SPREAD], [SPREAD, LOW], ("flatter", "flatter", "flatter")),
        ([(3.0, 3.1, 2.9)], [(4.0, 4.1, 3.9)], ("sharper", "sharper", "sharper")),
        ([LOW], [(4.0, 4.1, 3.9)], ("flatter", "sharper", "inconclusive")),
        ([LOW], [SPREAD], ("flatter", "not distinguishable", "inconclusive")),
        ([SPREAD], [LOW], ("not distinguishable", "flatter", "inconclusive")),
        ([SPREAD], [SPREAD, HIGH], ("not distinguishable", "not distinguishable", "not distinguishable")),
        ([LOW, (3.0, 3.1, 2.9)], [LOW], ("mixed", "flatter", "inconclusive")),
        ([LOW, (3.0, 3.1, 2.9)], [LOW, (3.0, 3.1, 2.9)], ("mixed", "mixed", "inconclusive")),
        ([LOW], [], ("flatter", "no verdict", "inconclusive")),
        ([LOW[:1]], [LOW[:1]], ("no verdict", "no verdict", "no verdict")),
    ],
)
def test_verdict_needs_agreement_of_all_families(
    raw: list[tuple[float, ...]], adaptive: list[tuple[float, ...]], words: tuple[str, str, str]
) -> None:
    runs = len(raw[0])
    names = [*RAW[: len(raw)], *ADAPTIVE[: len(adaptive)]]
    found = verdict(dict(zip(names, [*raw, *adaptive], strict=True)), dict.fromkeys(names, AT_TWO[:runs]))
    assert (found.family("raw"), found.family("adaptive"), found.word) == words
    assert [found.json()[key] for key in ("raw", "adaptive", "verdict")] == list(words)


def test_normalized_logits_may_object_and_the_context_may_not() -> None:
    ours = {"trace": LOW, "adaptive_trace": LOW, "normalized_sharpness": (3.0, 3.1, 2.9), "weight_norm": LOW}
    found = verdict(ours, dict.fromkeys(ours, AT_TWO))
    assert (found.word, found.family("normalized")) == ("inconclusive", "sharper")
    assert found.rows[-1].word == ""
    assert found.json()["measures"][-1]["verdict"] == ""


@pytest.mark.parametrize(
    ("raw", "adaptive", "sentence"),
    [
        (
            [LOW, SPREAD],
            [LOW],
            "SAM's minima against SGD's, 3 paired runs: flatter (raw measures: 1 flatter, 1 not distinguishable; "
            "adaptive measures: 1 flatter).",
        ),
        (
            [LOW],
            [SPREAD],
            "SAM's minima against SGD's, 3 paired runs: inconclusive, because measures of different kinds do not agree "
            "(raw measures: 1 flatter; adaptive measures: 1 not distinguishable).",
        ),
        (
            [LOW, (3.0, 3.1, 2.9)],
            [LOW],
            "SAM's minima against SGD's, 3 paired runs: inconclusive, because measures of one kind do not agree "
            "(raw measures: 1 flatter, 1 sharper; adaptive measures: 1 flatter).",
        ),
        (
            [SPREAD],
            [SPREAD],
            "SAM's minima against SGD's, 3 paired runs: not distinguishable (raw measures: 1 not distinguishable; "
            "adaptive measures: 1 not distinguishable).",
        ),
    ],
)
def test_sentences(raw: list[tuple[float, ...]], adaptive: list[tuple[float, ...]], sentence: str) -> None:
    found = judged(raw, adaptive)
    assert found.sentence() == found.json()["sentence"] == sentence
    assert f"- {sentence}" in found.markdown()


def test_one_run_gives_no_verdict() -> None:
    found = verdict({"trace": [1.0], "adaptive_trace": [1.0]}, {"trace": [9.0], "adaptive_trace": [9.0]})
    assert found.sentence() == (
        "SAM's minima against SGD's, 1 paired run: no verdict on flatness, which needs two runs of each at least."
    )
    assert found.json()["measures"][0]["difference"]["interval_95"] is None
    assert found.rows[0].cells()[3:5] == ["-8", ""]


def test_measures_that_are_not_finite_in_all_runs_are_left_out() -> None:
    ours = {"sharpness": (1.0, math.inf, 1.0), "trace": (1.0, math.nan, 1.0), "loss": LOW}
    found = verdict(ours, dict.fromkeys(ours, AT_TWO))
    assert [row.name for row in found.rows] == ["loss"]
    assert found.sentence().endswith("no verdict on flatness, as no raw or adaptive measure is finite in all of them.")
    pairs = [(flat(trace=1.0, sharpness=1.0), flat(trace=2.0))] * 2
    (other,) = compare([Pairing("a", "b", ("A", "B"), pairs)])
    assert [row.name for row in other.rows] == ["trace"]


def test_no_verdict_without_pairs() -> None:
    assert compare([Pairing("sam", "sgd", ("SAM", "SGD"), [])]) == []
    assert compare([Pairing("sam", "sgd", ("SAM", "SGD"), [(flat(trace=math.nan), flat(trace=1.0))])]) == []


def test_all_measures_of_all_methods_are_corrected_together_without_the_context() -> None:
    # three seeds that find a difference alone, and not as one of several of which the others are unclear
    barely, unclear = (1.0, 1.3, 0.8), SPREAD
    assert verdict({"trace": barely}, {"trace": AT_TWO}).rows[0].word == "flatter"
    context = {"trace": barely, "loss": unclear, "weight_norm": unclear, "lambda_min": unclear}
    assert verdict(context, dict.fromkeys(context, AT_TWO)).rows[0].word == "flatter"
    other = verdict(
        {"trace": barely, "sharpness": unclear, "adaptive_trace": unclear},
        dict.fromkeys(("trace", "sharpness", "adaptive_trace"), AT_TWO),
    )
    assert [row.word for row in other.rows] == ["not distinguishable"] * 3
    # the further measures and those of layers, which were asked for, are corrected among themselves
    asked = {"trace": barely, "rounding": barely} | {f"trace/{layer}": unclear for layer in "abc"}
    words = {row.name: row.word for row in verdict(asked, dict.fromkeys(asked, AT_TWO)).rows}
    assert words == {name: "flatter" if asked[name] is barely else "not distinguishable" for name in asked}
    pairings = [
        Pairing(name, "sgd", (name, "SGD"), [(flat(trace=a), flat(trace=2.0)) for a in values])
        for name, values in (("sam", barely), ("asam", unclear), ("gsam", unclear))
    ]
    assert [row.word for found in compare(pairings) for row in found.rows] == ["not distinguishable"] * 3
    assert [row.word for found in compare(pairings[:1]) for row in found.rows] == ["flatter"]


def test_measures_that_agree_are_all_found() -> None:
    # each alone is found; Holm's procedure would find none of the five
    barely = dict.fromkeys(("sharpness", "trace", "lambda_max", "adaptive_trace", "m_sharpness"), (1.0, 1.3, 0.8))
    found = verdict(barely, dict.fromkeys(barely, AT_TWO))
    assert [row.word for row in found.rows] == ["flatter"] * 5
    assert found.word == "flatter"


def losses(ours: Sequence[float], theirs: Sequence[float]) -> list[str]:
    return verdict({"trace": (1.0, 1.0), "loss": ours}, {"trace": (1.0, 1.0), "loss": theirs}).notes()


def test_note_warns_of_losses_that_are_far_apart() -> None:
    assert losses((0.1, 0.3), (0.04, 0.04)) == [
        "The loss is 0.04 for SGD and 0.2 for SAM, a factor of 5. Raw curvature falls with the loss itself, so being "
        "flatter and being fitted further cannot be distinguished here: compare at equal loss as well, by training SAM "
        "for longer."
    ]
    (other,) = losses((0.04, 0.04), (0.1, 0.3))
    assert "0.04 for SAM and 0.2 for SGD" in other
    assert "by training SGD for longer" in other
    (fitted,) = losses((0.0, 0.0), (0.1, 0.3))
    assert "The loss is 0 for SAM and 0.2 for SGD. Raw" in fitted


def test_no_note_where_losses_are_similar() -> None:
    assert losses((0.1, 0.1), (0.19, 0.21)) == []  # a factor of 2, to the bit
    assert losses((0.1, 0.1), (0.2, 0.21)) != []
    assert losses((0.0, 0.0), (0.0, 0.0)) == []
    assert losses((-3.0, -3.0), (1.0, 1.0)) == []  # a loss that may be negative has no ratio
    assert verdict({"trace": LOW}, {"trace": HIGH}).notes() == []


def test_notes_are_in_all_that_is_written() -> None:
    found = verdict({"trace": (1.0, 1.0), "loss": (0.1, 0.1)}, {"trace": (1.0, 1.0), "loss": (1.0, 1.0)})
    (note,) = found.notes()
    assert found.json()["notes"] == [note]
    assert f"- {note}" in found.markdown().splitlines()
    assert note in shown(found, 1000)


def test_markdown_has_a_row_for_each_measure_by_family() -> None:
    lines = judged([LOW], [LOW, LOW]).markdown().splitlines()
    assert lines[0] == "| measure | SGD | SAM | difference | 95 % interval | verdict |"
    assert all(line.count("|") - line.count("\\|") == 7 for line in lines[:7])
    label = FAMILIES["raw"].measures["sharpness"]
    assert f"| {label} | 2 ± 0 | 1 ± 0.1 | -1 | [-1.5, -0.52] | flatter |" in lines
    assert [line for line in lines if "**" in line] == ["| **Raw** | | | | | |", "| **Adaptive** | | | | | |"]
    lines = verdict({"trace/head.0": LOW}, {"trace/head.0": AT_TWO}).markdown().splitlines()
    assert lines[2] == "| **By layer** | | | | | |"
    assert lines[3].startswith("| head.0: trace | 2 ± 0 | 1 ± 0.1 | -1 |")


def shown(found: Verdict, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    found.show(console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_narrow_terminal_has_the_differences_on_a_line_each() -> None:
    every = {name: (1.01234e-5, 1.1e-5, 0.9e-5) for family in FAMILIES.values() for name in family.measures}
    found = verdict(every, dict.fromkeys(every, (1.0234, 2.2345, 1.8)))
    wide, narrow = shown(found, 140).splitlines(), shown(found, 80).splitlines()
    assert wide[0].split()[:3] == ["measure", "SGD", "SAM"]
    assert narrow[0].split() == ["measure", "difference", "95", "%", "interval", "verdict"]
    for kind, family in FAMILIES.items():
        for label in family.measures.values():
            (line,) = [line for line in narrow if line.startswith(f"{label} ")]
            assert line.rstrip().endswith("flatter") == (kind != "context")


def test_labels_are_not_markup_on_the_terminal() -> None:
    (row,) = verdict({"trace": LOW}, {"trace": HIGH}).rows
    assert "[bold]" in shown(Verdict("sam", "sgd", ("[bold]", "SGD"), [row]), 140)
