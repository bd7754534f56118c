"""Choose the radii of a recipe on held-out data, confirm them by ten other seeds, and save what was found.

    python benchmarks/evidence/run.py noisy-labels
    python benchmarks/evidence/run.py                    every recipe, one after the other

For each setting of the recipe it runs `steppe tune`, whose seeds begin at 100, and `steppe compare` with the best
radii, whose seeds begin at 0. Both are resumed where they were stopped, so this command is as well. The folders are in
runs/evidence. Each search and each setting is saved when it is done, in results/DEVICE/evidence_RECIPE.json. What is
saved, on any device, is not measured again, so that machines can share the work: to measure it again, delete it there.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import results  # noqa: E402
from evidence.measured import Measured, file_name  # noqa: E402
from evidence.recipes import EVIDENCE, Evidence  # noqa: E402
from steppe.experiments.storage.run_folder import RunFolder  # noqa: E402

FIRST_SEARCH_SEED = 100
NOTHING: Mapping[str, Any] = {"search": "", "trials": [], "best": {}}
"""What a search has found before it begins."""

_TINY = ["--epochs", "2", "--eval-every", "1", "--seeds", "2"]


def main() -> None:
    """Run the recipes that were named, and save each setting once it is confirmed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="recipe", help=f"by default all: {', '.join(EVIDENCE)}")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="the folder of the run folders")
    parser.add_argument("--runs-at-once", help="runs at a time; by default as many as there is room for")
    results.add_arguments(parser, device="cpu")
    args = parser.parse_args()
    for name in args.names:
        if name not in EVIDENCE:
            parser.error(f"{name!r} is not one of {', '.join(EVIDENCE)}")
    for name in args.names or EVIDENCE:
        measure(name, args)


def measure(name: str, args: argparse.Namespace) -> None:
    """Search and confirm the settings of a recipe that are not saved yet, and save each part."""
    evidence, saved = EVIDENCE[name], Measured.load(name, args.results)
    settings, searches = dict(saved.settings), dict(saved.searches)
    data = {"settings": {}, "searches": {}, **results.saved_data(file_name(name), args)}
    args.command = f"python benchmarks/evidence/run.py {name}"
    for setting, options in evidence.settings.items():
        if setting in settings:
            print(f"{name}, {setting or 'its only setting'}: saved", flush=True)
            continue
        folder = args.out / evidence.folder(name, setting)
        shared = [evidence.recipe or name, *options, *(_TINY if args.tiny else [])]
        how_many = [] if args.runs_at_once is None else ["--runs-at-once", args.runs_at_once]
        if (searched_in := evidence.chosen_in.get(setting)) is not None:
            found = {**settings[searched_in], "search": None, "trials": []}
        else:
            found = searches.get(setting, NOTHING)
            while evidence.searches(setting, found):
                found = search(folder, setting, shared, how_many, evidence, found, args)
                data["searches"][setting] = found
                results.save(file_name(name), data, args)
        settings[setting] = confirm(folder, setting, shared, how_many, evidence, found, args)
        data["settings"][setting] = settings[setting]
        data["searches"].pop(setting, None)
        results.save(file_name(name), data, args)


def confirm(
    folder: Path,
    setting: str,
    shared: Sequence[str],
    how_many: Sequence[str],
    evidence: Evidence,
    found: Mapping[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Compare the methods at the best radii that a search has found."""
    chosen = evidence.best(setting, found["best"])
    runs = None if args.tiny else evidence.confirming_runs(setting)
    seeds = [] if runs is None else ["--seeds", str(runs)]
    others = [*evidence.others_in.get(setting, ()), *evidence.others]
    comparison = ["compare", *shared, "--methods", evidence.base, *chosen, *others, *seeds]
    _steppe([*comparison, *how_many, "--out", str(folder)])
    return {
        "date": results.today(),
        "search": found["search"],
        "command": shlex.join(["steppe", *comparison]),
        "trials": found["trials"],
        "best": found["best"],
        "chosen": chosen,
        "summary": json.loads((folder / "summary.json").read_text("utf-8")),
        "curves": _curves(folder),
    }


def search(
    folder: Path,
    setting: str,
    shared: Sequence[str],
    how_many: Sequence[str],
    evidence: Evidence,
    found: Mapping[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Try the next radii on held-out data, with one command; return what was `found` before and by it."""
    values, methods = next(iter(evidence.searches(setting, found).items()))
    seeds = ["--first-seed", str(FIRST_SEARCH_SEED), *([] if args.tiny else ["--seeds", str(evidence.seeds)])]
    how = ["--sampler", "grid", "--objective", evidence.objective, "--no-baseline"]
    words = ["tune", *shared, "--methods", *methods, *seeds, *how, "--search", values]
    searched = folder.with_name("-".join([folder.name, "tune", *values.replace("=", ",").split(",")]))
    _steppe([*words, *how_many, "--out", str(searched)])
    summary = json.loads((searched / "summary.json").read_text("utf-8"))
    sign = 1 if summary["higher_is_better"] else -1
    best = {one["method"]: [sign * one["validation"]["mean"], one["spec"]] for one in summary["best"]}
    return {
        "search": "\n".join([*found["search"].splitlines(), shlex.join(["steppe", *words])]),
        "trials": [*found["trials"], *_trials(searched / "trials.jsonl", methods, evidence.objective)],
        "best": found["best"] | {m: max(found["best"].get(m, best[m]), best[m], key=itemgetter(0)) for m in methods},
    }


def _steppe(words: Sequence[str]) -> None:
    print(f"$ {shlex.join(['steppe', *words])}", flush=True)
    subprocess.run([sys.executable, "-m", "steppe", *words], check=True)


def _trials(path: Path, methods: Sequence[str], objective: str) -> list[dict[str, Any]]:
    """Return the value of each run of each trial of these methods on the held-out data."""
    field = f"test_{'accuracy' if objective == 'metric' else objective}"
    trials = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        {"method": trial["method"], "values": trial["values"], "found": [run[field] for run in trial["runs"]]}
        for trial in trials
        if trial.get("state") == "complete" and trial["method"] in methods
    ]


def _curves(path: Path) -> dict[str, list[list[float]]]:
    """Return the accuracy on the test data during training: for each method, rows of standardized epoch and runs."""
    folder = RunFolder(path)
    recipe = folder.recipe().replace(out=path)
    found: dict[str, dict[int, list[float]]] = {}
    for run, records in folder.results(recipe).items():
        for record in records:
            of_method = found.setdefault(str(run.method), {})
            of_method.setdefault(record.standardized_epoch, []).append(record["test_accuracy"])
    return {method: [[epoch, *runs] for epoch, runs in sorted(of.items())] for method, of in found.items()}


if __name__ == "__main__":
    main()
