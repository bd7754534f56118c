"""Corrupted images, calibration and rounded weights on the page: the verdicts in sentences, and table rows."""

from collections.abc import Iterator, Sequence
from typing import Any

from steppe.experiments.analysis.robustness import Robustness
from steppe.experiments.analysis.summary import Summary
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.report.content import Headline, cells, generalization, subject
from steppe.experiments.robustness.records import Measure


def headlines(robustness: Robustness) -> list[Headline]:
    """Return the verdicts on the main measures: one sentence for all methods it is true of."""
    words: dict[str, list[tuple[str, str]]] = {}
    for verdict in robustness.main_verdicts():
        words.setdefault(verdict.method, []).append((verdict.metric.name, verdict.word))
    labels = {str(method): method.label for method in robustness.methods}
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for method, found in words.items():
        groups.setdefault(tuple(found), []).append(labels[method])
    bases = (labels[verdict.base] for verdicts in robustness.verdicts.values() for verdict in verdicts)
    base = next(bases, "")
    return [_headline(subject(ours, base), found) for found, ours in groups.items()]


def _headline(about: str, found: Sequence[tuple[str, str]]) -> Headline:
    return [(about, ""), *((f"{', ' if i else ''}{name} ", word) for i, (name, word) in enumerate(found)), (".", "")]


def groups(recipe: Recipe, summary: Summary, robustness: Robustness) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield title, explanation and rows of each kind of measures, as `content.flatness_groups` does."""
    *_, clean = generalization(recipe, summary)
    under = [measure for measure in robustness.measures if measure.name.startswith("accuracy under ")]
    rounded = [measure for measure in robustness.measures if measure.name.startswith("accuracy at ")]
    calibration = [measure for measure in robustness.measures if not measure.higher_is_better]
    if under:
        clean |= {"label": "clean images"}
        about = "In percent, on clean images, on average over all corruptions, and under each. Higher is better."
        yield "Accuracy on corrupted images", about, [clean, *(_row(recipe, robustness, measure) for measure in under)]
    if calibration:
        about = "How well the probabilities of the classes fit the labels, on clean images. Lower is better."
        yield "Calibration", about, [_row(recipe, robustness, measure) for measure in calibration]
    if rounded:
        about = "In percent, on clean images, with few possible values for each weight. Higher is better."
        yield "Accuracy with rounded weights", about, [_row(recipe, robustness, measure) for measure in rounded]


def _row(recipe: Recipe, robustness: Robustness, measure: Measure) -> dict[str, Any]:
    form = ".2f" if measure.unit == "%" else ".3f"
    values = {
        method: found[measure.name].text(form, sign=" ± ")
        for method, found in robustness.values.items()
        if measure.name in found
    }
    verdicts = robustness.verdicts.get(measure.name, ())
    changes = {verdict.method: (verdict.first.difference, verdict.word) for verdict in verdicts}
    label = measure.heading.replace("\n", " ") if measure.higher_is_better else measure.name
    label += ", points" if measure.unit and not measure.higher_is_better else ""
    return {"label": label, "name": measure.name, "cells": cells(recipe, values, changes)}
