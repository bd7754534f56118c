"""Render the results as Markdown."""

import re
from collections.abc import Callable, Mapping, Sequence

from gpu.comparison import Comparison, comparison, description
from gpu.measurements import EVIDENCE
from markdown_tables import difference, mean_and_sd, row
from results import Result
from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.analysis.summary import summarize
from steppe.experiments.analysis.verdicts import CAVEATS, Pairing, compare
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Run

_PRECISION = "| method | test %, bfloat16 | float32 | difference | gap, bfloat16 | float32 | difference | runs |"


def correctness(found: Sequence[Result]) -> str:
    """Return the counts of tests by file, and the failed tests."""
    (result,) = found
    data = result.data
    lines = ["| tests | passed | failed | skipped |", "|---|---:|---:|---:|"]
    rows = {**{f"`{name}`": counts for name, counts in data["files"].items()}, "**all**": data}
    for name, counts in rows.items():
        lines.append(row([name, *(str(counts.get(k, 0)) for k in ("passed", "failed", "skipped"))]))
    for failure in data["failures"]:
        # pytest marks the line of the error with "E "
        error = next((line for line in failure["last_lines"] if line.startswith("E ")), failure["last_lines"][-1])
        lines += ["", f"Failed: `{failure['test']}`: `{error.removeprefix('E').strip()}`"]
    return _with_sources(lines, found)


def training(found: Sequence[Result]) -> str:
    """Return the rows and verdicts of each setting, as `steppe compare` writes them, and the verdict on flatness."""
    lines = [description(found)]
    for setting in found[0].data["recipes"]:
        known = comparison(found, setting)
        lines += ["", *_summary(known), *_flatness(known), *_failures(known)]
    return _with_sources(lines, found)


def precision(found: Sequence[Result]) -> str:
    """Return the differences between bfloat16 and float32, paired by method and seed."""
    half, full = (comparison(found, setting) for setting in ("bfloat16", "float32"))
    lines = [description(found), "", _PRECISION, "|---" + "|---:" * 7 + "|"]
    differences = []
    for method in full.recipe.comparison.methods:
        cells = [method.label]
        for name in ("test_accuracy", "gap"):
            halves, fulls = _final(half, method, name), _final(full, method, name)
            seeds = sorted(halves.keys() & fulls.keys())
            if seeds:
                differences.append(estimate([halves[seed] - fulls[seed] for seed in seeds]))
                cells += [mean_and_sd(estimate([values[seed] for seed in seeds])) for values in (halves, fulls)]
                cells.append(difference(differences[-1]))
        lines.append(row([*cells, str(len(seeds))]))
    beyond = sum(bool(each.sign) for each in differences)
    tf32 = " The convolutions of float32 compute in TF32, as torch's do by default." if found[0].on_gpu else ""
    verdict = f"{beyond} of {len(differences)} differences have a 95 % interval that excludes 0.{tf32}"
    lines += ["", f"After {full.recipe.comparison.epochs} standardized epochs, {verdict}"]
    return _with_sources([*lines, *_failures(half), *_failures(full)], found)


RENDER: Mapping[str, Callable[[Sequence[Result]], str]] = {
    "correctness": correctness,
    "article": training,
    **dict.fromkeys(EVIDENCE, training),
    "precision": precision,
    "pareto": training,
    "presets": training,
}
"""Functions that render one device's results, of all seeds, by name."""


def _summary(known: Comparison) -> list[str]:
    # without its headings, because the page has its own
    title, _, rest = summarize(known.recipe, known.records).markdown().partition("\n\n")
    return [f"{title.removeprefix('# ')}.", "", re.sub(r"^#+ (.*)$", r"\1:", rest, flags=re.MULTILINE).rstrip()]


def _flatness(known: Comparison) -> list[str]:
    """Return the verdicts on flatness at equal compute, and one sentence each on the final weights of all runs."""
    if not known.flatness:
        return []
    reference, *others = known.recipe.comparison.methods
    lines = []
    for point, title in (("epochs", "at equal compute"), ("standardized_epochs", "at the ends of all runs")):
        pairings = []
        for method in others:
            pairs = [
                (known.flatness[own], known.flatness[other])
                for run in known.records
                if run.method == method
                and (own := (run, _epoch(run, point))) in known.flatness
                and (other := _reference(run, reference, point)) in known.flatness
            ]
            pairings.append(Pairing(str(method), str(reference), (method.label, reference.label), pairs))
        for verdict in compare(pairings):
            text = verdict.markdown() if point == "epochs" else f"- {verdict.sentence()}"
            lines += ["", f"Flatness {title}:", "", text]
    return [*lines, *(f"- {caveat}" for caveat in CAVEATS)]


def _reference(run: Run, method: MethodSpec, point: str) -> tuple[Run, int]:
    other = Run(run.recipe, method, run.seed)
    return other, _epoch(other, point)


def _epoch(run: Run, point: str) -> int:
    return run.recipe.comparison.epochs if point == "epochs" else run.standardized_epochs


def _failures(known: Comparison) -> list[str]:
    return [f"- Failed: {reason}" for reason in known.failures]


def _final(known: Comparison, method: MethodSpec, name: str) -> dict[int, float]:
    """Return a field of the last record of each run, by seed."""
    return {run.seed: records[-1][name] for run, records in known.records.items() if run.method == method}


def _with_sources(lines: Sequence[str], found: Sequence[Result]) -> str:
    """Append the devices, versions, dates and commands of the results."""
    sources = dict.fromkeys(result.source for result in found)
    return "\n".join([*lines, "", *(f"{each}  " if len(sources) > 1 else each for each in sources)]) + "\n"
