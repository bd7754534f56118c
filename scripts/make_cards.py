"""Write the pages of docs/methods from the cards in src/steppe/methods and from measured.json beside them.

    python scripts/make_cards.py                        write the pages
    python scripts/make_cards.py RUN ...                store the results of run folders of `steppe compare` first
    python scripts/make_cards.py --memory memory.json   store the output of benchmarks/memory.py --json first
    python scripts/make_cards.py --check                write nothing; exit 1 if a page is stale

Numbers that are not given stay as they are in measured.json: a RUN replaces the comparisons in its setting that have
one of its methods, the base and SAM aside. Several RUNs are stored in the given order.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steppe.experiments.analysis.metric_verdicts import MetricVerdict
from steppe.experiments.analysis.statistics import Estimate
from steppe.experiments.analysis.summary import Row, Summary, setting, summarize
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.presets import command_line
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.run_folder import RunFolder
from steppe.methods import cards
from steppe.methods.registry import CARDS

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "src" / "steppe" / "methods" / "measured.json"
PAGES = ROOT / "docs" / "methods"

_ENVIRONMENT = ("date", "steppe", "commit", "python", "torch", "cpu", "gpu", "threads")
_CORRUPTED = "test_accuracy under corruptions"
_VALUES = ("passes", "train_accuracy", "test_accuracy")


def pages() -> Mapping[str, str]:
    """Return the name and the text of each page."""
    found = {f"{name}.md": cards.card(name) for name in CARDS}
    return {"README.md": cards.index(), **found}


def comparison(path: Path) -> dict[str, Any]:
    """Return the results of a run folder at equal compute for measured.json; ExperimentError if there are none."""
    folder = RunFolder(path)
    recipe = folder.recipe()
    summary = summarize(recipe, folder.results(recipe))
    if summary.unfinished:
        print(f"Not finished: {', '.join(summary.unfinished)}", file=sys.stderr)
    rows = [row for row in summary.rows if row.standardized_epoch == recipe.comparison.epochs]
    if not rows:
        raise ExperimentError(
            f"{path} has no results at {recipe.comparison.epochs} standardized epochs: let the comparison finish"
        )
    sam = _sam(recipe)
    differences = [*_differences(summary)]
    if sam is not None and sam != recipe.comparison.methods[0]:
        others = tuple(m for m in recipe.comparison.methods if m not in (sam, recipe.comparison.methods[0]))
        against = recipe.replace(methods=(sam, *others))
        differences += _differences(summarize(against, folder.results(against)))
    sessions = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    clean = recipe.replace(out=None, data_dir=None, log=(), checkpoint_seconds=60.0)
    return {
        "setting": setting(recipe),
        "labels": f"{100 * recipe.data.label_noise:g} % wrong labels" if recipe.data.label_noise else "correct labels",
        "standardized_epochs": recipe.comparison.epochs,
        "command": command_line(clean),
        "environment": {name: sessions[-1].get(name) for name in _ENVIRONMENT},
        "base": str(recipe.comparison.methods[0]),
        "sam": None if sam is None else str(sam),
        "rows": [
            {
                "method": str(row.method),
                "label": row.method.label,
                "rho": _rho(row.method, recipe),
                **{name: _estimate(_value(row, name)) for name in _VALUES},
                **({} if recipe.data.label_noise else {"gap": _estimate(row.measures["gap"])}),
                **({"corrupted_accuracy": _estimate(row.measures[_CORRUPTED])} if _CORRUPTED in row.measures else {}),
            }
            for row in rows
        ],
        "differences": differences,
    }


def _sam(recipe: Recipe) -> MethodSpec | None:
    """Return the spec of SAM itself, if it was compared."""
    found = [m for m in recipe.comparison.methods if CARDS["sam"].covers(str(m))]
    return min(found, key=lambda spec: len(str(spec))) if found else None


def _rho(spec: MethodSpec, recipe: Recipe) -> float | None:
    return spec.rho(recipe.training.rho) if "rho" in spec.definition.arguments else None


def _differences(summary: Summary) -> Iterator[dict[str, Any]]:
    for test, gap in summary.verdicts_with_gaps():
        values = {"test_accuracy": _decided(test), **({} if gap is None else {"gap": _decided(gap)})}
        yield {"method": test.method, "reference": test.base, **values}


def _decided(verdict: MetricVerdict) -> dict[str, Any]:
    """Return the decision, corrected for all methods of the run folder as `steppe compare` does, and its word."""
    difference = verdict.first.difference
    interval = None if difference.interval is None else [round(end, 5) for end in difference.interval]
    return {
        **_estimate(Estimate(difference.n, difference.mean, difference.sd)),
        "comparisons": difference.comparisons,
        "interval_95": interval,
        "verdict": verdict.word,
    }


def _value(row: Row, name: str) -> Estimate:
    found: Estimate = row.measures[name] if name in row.measures else getattr(row, name)
    return found


def _estimate(value: Estimate) -> dict[str, Any]:
    return {name: round(number, 5) if isinstance(number, float) else number for name, number in asdict(value).items()}


def _merged(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the new numbers, and the old ones of the methods that were not measured again."""
    found = {**(old["methods"] if old else {}), **new["methods"]}
    return {**new, "methods": {name: found[name] for name in CARDS if name in found}}


def _is_replaced(old: Mapping[str, Any], new: Sequence[Mapping[str, Any]]) -> bool:
    """True if one of the new comparisons has the setting and a method of the old one."""
    return any(old["setting"] == one["setting"] and _methods(old) & _methods(one) for one in new)


def _methods(run: Mapping[str, Any]) -> set[str]:
    """Return the names of the methods of a comparison, without the base and SAM, to which it compares them."""
    specs = {row["method"] for row in run["rows"]} - {run["base"], run["sam"]}
    return {MethodSpec.parse(spec).name for spec in specs}


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def private(values: Mapping[str, Any]) -> list[str]:
    """Return paths of a machine, which do not belong in a public file."""
    return re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|mnt|data|Users)\b[^\s\"]*", json.dumps(values))


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders of `steppe compare`")
    parser.add_argument("--memory", type=Path, metavar="FILE", help="output of benchmarks/memory.py --json")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    given = parser.parse_args(words)
    if given.check:
        stale = [name for name, text in pages().items() if _text(PAGES / name) != text]
        extra = {path.name for path in PAGES.glob("*.md")} - set(pages())
        for name in (*stale, *sorted(extra)):
            print(f"{PAGES / name} is stale: run python scripts/make_cards.py", file=sys.stderr)
        return 1 if stale or extra else 0
    values = read()
    try:
        if given.memory is not None:
            values["memory"] = _merged(values["memory"], json.loads(given.memory.read_text(encoding="utf-8")))
        if given.runs:
            new = [comparison(path) for path in given.runs]
            values["comparisons"] = [old for old in values["comparisons"] if not _is_replaced(old, new)] + new
    except (OSError, ValueError, ExperimentError) as error:
        print(f"make_cards: {error}", file=sys.stderr)
        return 1
    if found := private(values):
        print(f"make_cards: paths of this machine are in the numbers: {', '.join(found)}", file=sys.stderr)
        return 1
    MEASURED.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    cards.measured.cache_clear()
    PAGES.mkdir(parents=True, exist_ok=True)
    now = pages()
    for stale_page in {path.name for path in PAGES.glob("*.md")} - set(now):
        (PAGES / stale_page).unlink()
    for name, text in now.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    print(f"{MEASURED}: {len(values['comparisons'])} comparisons. {len(now)} pages in {PAGES}")
    return 0


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
