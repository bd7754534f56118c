"""Measure how often a method is called different from itself, and how many seeds find a difference.

    python benchmarks/verdicts/run.py                    three quarters of an hour on one core
    python benchmarks/verdicts/run.py --only flatness    a quarter: the other parts stay as they were saved

In simulation, equal methods are compared whose runs are normal, skewed, heavy-tailed or coarse, with 2 to 10 seeds, and
up to five of them at once. In reality, small networks are trained hundreds of times by SGD and by SAM: runs of one
method are compared with other runs of the same method, and SAM with SGD. For a part of them the flatness is measured as
well. The runs are saved as they are made, in verdicts_runs.json and verdicts_flatness_runs.json, and not repeated: the
same command resumes them.

All decisions are those of `steppe.experiments.analysis.statistics`, as `steppe compare` uses them. What should not be
called different is, in at most 5 % of comparisons.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import add_arguments, read, save, saved_data
from steppe.experiments.analysis.statistics import seeds_needed
from verdicts import calibration
from verdicts.problems import BUDGET, PROBLEMS, Problem, train, train_and_measure
from verdicts.table import render

METHODS = ("sgd", "sam")
SEEDS, COUNTS, SHARES = (2, 3, 5, 7, 10), (1, 2, 3, 5), (0.5, 0.8, 0.95)
REAL_SEEDS, REAL_COUNTS = (2, 3, 5, 10), (1, 3)
SAVED_EVERY = 20
MEASURED, FLATNESS_SEEDS = "digits", (2, 3, 5, 10)


def main() -> None:
    """Train the runs that are missing, compare, save the result and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, device="cpu")
    parser.add_argument("--runs", type=int, default=400, help="real runs of each method on each problem")
    parser.add_argument("--comparisons", type=int, default=20_000, help="simulated comparisons for each number")
    parser.add_argument("--measured-runs", type=int, default=100, help="of these, runs whose flatness is measured")
    parser.add_argument("--only", choices=["metrics", "flatness"], help="keep what is saved of the other part")
    args = parser.parse_args()
    if args.tiny:
        args.runs, args.comparisons, args.measured_runs = 2 * 2 * calibration.BLOCKS, 10, 2 * calibration.BLOCKS
    data = saved_data("verdicts", args)
    if args.only != "flatness":
        data |= metrics(args)
    if args.only != "metrics":
        data |= {"flatness": flatness(args)}
    print(render(read(save("verdicts", data, args))))


def metrics(args: argparse.Namespace) -> dict[str, Any]:
    """Return how often a metric differs, simulated and measured, and how many seeds find a difference."""
    values = train_all(args)
    rounds = 1 if args.tiny else 40
    return {
        "runs": args.runs,
        "same": list(calibration.simulate_same(SEEDS, COUNTS, args.comparisons)),
        "unequal_shapes": list(calibration.simulate_unequal_shapes(SEEDS, args.comparisons)),
        "needed": [
            {"effect": effect, "methods": m, "share": share, "seeds": seeds_needed(effect, share, m)}
            for effect in calibration.EFFECTS
            for m in (1, 3, 5)
            for share in SHARES
        ],
        "power": list(calibration.simulate_power(max(1, args.comparisons // 5))),
        "real": [compare(name, values[name], rounds) for name in PROBLEMS],
    }


def flatness(args: argparse.Namespace) -> dict[str, Any]:
    """Return how often any measure of flatness differs, simulated and measured, and any number of a report."""
    values = measure_all(args)
    rounds = 1 if args.tiny else 40
    return {
        "runs": args.measured_runs,
        "simulated": list(calibration.simulate_flatness(FLATNESS_SEEDS, max(1, args.comparisons // 20))),
        "real": {
            method: [
                found
                for seeds in FLATNESS_SEEDS
                if 2 * seeds <= len(runs) // calibration.BLOCKS
                for found in calibration.compare_same_reports(runs, seeds, rounds)
            ]
            for method, runs in values.items()
        },
    }


def measure_all(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return all numbers of the runs whose flatness is measured, by method and seed; train those that are not saved."""
    torch.set_num_threads(1)
    problem = replace(PROBLEMS[MEASURED], epochs=2) if args.tiny else PROBLEMS[MEASURED]
    settings = _settings(problem) | {"budget": asdict(BUDGET)}
    saved = saved_data("verdicts_flatness_runs", args)
    found: dict[str, list[dict[str, float]]]
    found = saved["values"] if saved.get("settings") == settings else {method: [] for method in METHODS}
    for method in METHODS:
        while len(found[method]) < args.measured_runs:
            found[method].append(train_and_measure(problem, method, seed=len(found[method])))
            if len(found[method]) % SAVED_EVERY == 0 or len(found[method]) == args.measured_runs:
                save("verdicts_flatness_runs", {"settings": settings, "values": found}, args)
                print(f"flatness, {method}: {len(found[method])} runs", flush=True)
    return {method: runs[: args.measured_runs] for method, runs in found.items()}


def train_all(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the metric of all runs, by problem, method and seed; train those that are not saved."""
    torch.set_num_threads(1)
    chosen = {name: replace(problem, epochs=2) if args.tiny else problem for name, problem in PROBLEMS.items()}
    problems = {name: _settings(problem) for name, problem in chosen.items()}
    saved = saved_data("verdicts_runs", args)
    found: dict[str, dict[str, list[float]]] = {
        name: saved["values"][name] if saved.get("problems", {}).get(name) == settings else {m: [] for m in METHODS}
        for name, settings in problems.items()
    }
    for name, problem in chosen.items():
        for method in METHODS:
            values = found[name][method]
            while len(values) < args.runs:
                missing = range(len(values), min(args.runs, len(values) + SAVED_EVERY))
                values += [train(problem, method, seed) for seed in missing]
                save("verdicts_runs", {"problems": problems, "values": found}, args)
                print(f"{name}, {method}: {len(values)} runs", flush=True)
    return {name: {m: values[: args.runs] for m, values in of.items()} for name, of in found.items()}


def compare(name: str, values: dict[str, list[float]], rounds: int) -> dict[str, Any]:
    """Compare each method of a problem with itself, and SAM with SGD."""
    sizes = [(seeds, m) for seeds in REAL_SEEDS for m in REAL_COUNTS]
    in_block = len(values["sgd"]) // calibration.BLOCKS
    return {
        "problem": PROBLEMS[name].description,
        "same": {
            method: [
                calibration.compare_same(values[method], seeds, m, rounds)
                for seeds, m in sizes
                if seeds * (1 + m) <= in_block
            ]
            for method in METHODS
        },
        "different": [
            calibration.compare_different(values["sam"], values["sgd"], seeds, rounds)
            for seeds in REAL_SEEDS
            if seeds <= in_block
        ],
    }


def _settings(problem: Problem) -> dict[str, Any]:
    """Return what the numbers of a problem depend on: saved runs with other settings are not used."""
    values = asdict(problem)
    return {name: values[name] for name in ("description", "lr", "rho", "epochs", "batch_size")} | {
        "sizes": list(problem.sizes)
    }


if __name__ == "__main__":
    main()
