"""The results as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu.comparison import Comparison, comparison, told
from results import Result
from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.summary import summarize
from steppe.experiments.analysis.verdicts import CAVEATS, compared
from steppe.experiments.config.method_spec import parse
from steppe.experiments.config.recipe import Run

_PRECISION = "| method | test %, bfloat16 | float32 | difference | gap, bfloat16 | float32 | difference | runs |"


def correctness(found: Sequence[Result]) -> str:
    """Counts of the tests file by file, and those that failed."""
    (result,) = found
    data = result.data
    lines = ["| tests | passed | failed | skipped |", "|---|---:|---:|---:|"]
    rows = {**{f"`{name}`": counts for name, counts in data["files"].items()}, "**all**": data}
    for name, counts in rows.items():
        lines.append(f"| {name} | " + " | ".join(str(counts.get(k, 0)) for k in ("passed", "failed", "skipped")) + " |")
    for failure in data["failures"]:
        # the line that pytest marks as the error's, else the last one
        error = next((line for line in failure["last_lines"] if line.startswith("E ")), failure["last_lines"][-1])
        lines += ["", f"Failed: `{failure['test']}`: `{error.removeprefix('E').strip()}`"]
    return _block(lines, found)


def trained(found: Sequence[Result]) -> str:
    """Rows and verdicts of a comparison, as `steppe compare` gives them, and the verdict on flatness."""
    known = comparison(found)
    lines = [told(found), "", *_summary(known), *_flatness(known), *(f"- Failed: {why}" for why in known.failed)]
    return _block(lines, found)


def precision(found: Sequence[Result]) -> str:
    """Whether bfloat16 is as accurate as float32: differences, paired by method and seed."""
    half, full = (comparison(found, way) for way in ("bfloat16", "float32"))
    lines = [told(found), "", _PRECISION, "|---" + "|---:" * 7 + "|"]
    differences = []
    for method in full.recipe.methods:
        cells = [parse(method).label]
        for name in ("test_accuracy", "gap"):
            ours, theirs = _ends(half, method, name), _ends(full, method, name)
            seeds = sorted(ours.keys() & theirs.keys())
            if seeds:
                differences.append(estimate([ours[seed] - theirs[seed] for seed in seeds]))
                cells += [_both(estimate([of[seed] for seed in seeds])) for of in (ours, theirs)]
                cells.append(_interval(differences[-1]))
        lines.append("| " + " | ".join([*cells, str(len(seeds))]) + " |")
    beyond = sum(bool(difference.sign) for difference in differences)
    tf32 = " The convolutions of float32 compute in TF32, as torch's do by default." if found[0].on_gpu else ""
    lines += ["", f"After {full.recipe.epochs} standardized epochs, {beyond} of {len(differences)} differences are "]
    lines[-1] += f"beyond their 95 % interval.{tf32}"
    return _block([*lines, *(f"- Failed: {why}" for of in (half, full) for why in of.failed)], found)


RENDER: Mapping[str, Callable[[Sequence[Result]], str]] = {
    "correctness": correctness,
    "article": trained,
    "precision": precision,
    "pareto": trained,
    "presets": trained,
}
"""Each table by its name; it takes one device's results, of all seeds."""


def _summary(known: Comparison) -> list[str]:
    # without its heading: the page has its own
    title, _, rest = summarize(known.recipe, known.results).markdown().partition("\n\n")
    return [f"{title.removeprefix('# ')}.", "", rest.rstrip()]


def _flatness(known: Comparison) -> list[str]:
    """The verdicts at equal compute, and in a sentence those at the ends of all runs."""
    if not known.flatness:
        return []
    reference, *others = known.recipe.methods
    lines = []
    for method in others:
        labels = parse(method).label, parse(reference).label
        for at, words in (("epochs", "at equal compute"), ("standardized_epochs", "at the ends of all runs")):
            pairs = [
                (known.flatness[ours], known.flatness[theirs])
                for run in known.results
                if run.method == method
                and (ours := (run, _epoch(run, at))) in known.flatness
                and (theirs := (other := Run(known.recipe, reference, run.seed), _epoch(other, at))) in known.flatness
            ]
            verdict = compared(method, reference, labels, pairs)
            if verdict is not None:
                told = verdict.markdown() if at == "epochs" else f"- {verdict.sentence()}"
                lines += ["", f"Flatness {words}:", "", told]
    return [*lines, *(f"- {caveat}" for caveat in CAVEATS)]


def _epoch(run: Run, at: str) -> int:
    return run.recipe.epochs if at == "epochs" else run.standardized_epochs


def _ends(known: Comparison, method: str, name: str) -> dict[int, float]:
    """A field of the last record of each run, by seed."""
    return {run.seed: getattr(records[-1], name) for run, records in known.results.items() if run.method == method}


def _both(value: Estimate) -> str:
    return f"{value.mean:.2f}" + ("" if value.sd is None else f"±{value.sd:.2f}")


def _interval(value: Estimate) -> str:
    half = value.half_width
    return f"{value.mean:+.2f}" + ("" if half is None else f" [{value.mean - half:+.2f}, {value.mean + half:+.2f}]")


def _block(lines: Sequence[str], found: Sequence[Result]) -> str:
    """The lines, and where all that was measured."""
    places: dict[str, Any] = dict.fromkeys(result.where for result in found)
    return "\n".join([*lines, "", *(f"{place}  " if len(places) > 1 else place for place in places)]) + "\n"
