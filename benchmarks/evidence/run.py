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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import results  # noqa: E402
from evidence.measured import Measured, file_name  # noqa: E402
from evidence.recipes import EVIDENCE, Evidence  # noqa: E402
from steppe.experiments.storage.run_folder import RunFolder  # noqa: E402

FIRST_SEARCH_SEED = 100
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
            if setting not in searches:
                searches[setting] = search(folder, setting, shared, how_many, evidence, args)
                data["searches"][setting] = searches[setting]
                results.save(file_name(name), data, args)
            found = searches[setting]
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
    comparison = ["compare", *shared, "--methods", evidence.base, *chosen, *evidence.others, *seeds]
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
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Search the radius of each tuned method on held-out data; return the commands, the trials and the best ones."""
    commands, trials, best = list[str](), list[dict[str, Any]](), dict[str, tuple[float, str]]()
    seeds = ["--first-seed", str(FIRST_SEARCH_SEED), *([] if args.tiny else ["--seeds", str(evidence.seeds)])]
    how = ["--sampler", "grid", "--objective", evidence.objective, "--no-baseline", "--search"]
    for factor, methods in evidence.searches(setting).items():
        searched = folder.with_name(f"{folder.name}-tune" + (f"-{factor:g}" if factor != 1 else ""))
        radii = "rho=" + ",".join(f"{factor * radius:g}" for radius in evidence.radii)
        words = ["tune", *shared, "--methods", *methods, *seeds, *how, radii]
        _steppe([*words, *how_many, "--out", str(searched)])
        commands.append(shlex.join(["steppe", *words]))
        trials += _trials(searched / "trials.jsonl", evidence.objective)
        summary = json.loads((searched / "summary.json").read_text("utf-8"))
        sign = 1 if summary["higher_is_better"] else -1
        best |= {one["method"]: (sign * one["validation"]["mean"], one["spec"]) for one in summary["best"]}
    return {"search": "\n".join(commands), "trials": trials, "best": best}


def _steppe(words: Sequence[str]) -> None:
    print(f"$ {shlex.join(['steppe', *words])}", flush=True)
    subprocess.run([sys.executable, "-m", "steppe", *words], check=True)


def _trials(path: Path, objective: str) -> list[dict[str, Any]]:
    """Return the value of each run of each trial on the held-out data."""
    field = f"test_{'accuracy' if objective == 'metric' else objective}"
    trials = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        {"method": trial["method"], "values": trial["values"], "found": [run[field] for run in trial["runs"]]}
        for trial in trials
        if trial.get("state") == "complete"
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
