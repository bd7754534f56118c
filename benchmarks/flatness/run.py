"""Measure time to lambda_max, time to the spectral density, and memory, of Steppe and of other packages.

    python benchmarks/flatness/run.py                                    all cases, with the installed tools
    python benchmarks/flatness/run.py --case one-8 --repeat 5            one case
    python benchmarks/flatness/run.py --peers DIR --peers CHECKOUT       with packages in other folders

DIR is a folder made by ``pip install --no-deps --target DIR hessian-eigenthings==1.0.0a5``, and CHECKOUT a checkout,
such as that of github.com/amirgholami/PyHessian. The committed results use its commit de8cf23, because the density of
release 0.1 needs ``torch.eig``, which torch has removed.

All tools measure the same network, a PreAct ResNet-18 in evaluation mode, in float32, on the same images, in one
process and one thread, in turns. Times are processor time, so that other jobs on the machine matter little; quote the
ratios. "Tuned" options are the cheapest ones found for each tool with which lambda_max is within 1e-3 of its float64
value in every round of the first case. A tool without a stopping rule gets the smallest number of iterations that
suffices, which a user would not know. The same options are used in the other cases. The error is the largest of all
rounds, and is marked if it exceeds 1e-3.
"""

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from flatness.problem import Problem, exact_lambda_max, make_problem  # noqa: E402
from flatness.table import render  # noqa: E402
from flatness.tools import TOOLS, Configuration, version  # noqa: E402
from timing import spread  # noqa: E402

RESULTS = HERE / "results"
CASES = {"one-8": (8, 1), "one-16": (16, 1), "many-8": (8, 8)}  # width, batches
DENSITIES = {"density-one": (8, 1, 2, 16), "density-many": (8, 4, 2, 8)}  # width, batches, probes, iterations
MEMORY = (1, 4, 16)  # batches
TUNED: dict[str, dict[str, Any]] = {
    "steppe": {"tol": 2e-2},
    "pyhessian": {"tol": 5e-4},
    "eigenthings": {"max_iter": 7},
    "curvlinops": {"ncv": 6, "tol": 1e-2},
}


def main() -> None:
    """Parse the arguments, measure, and write results.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*CASES, *DENSITIES, "memory"], help="may be repeated")
    parser.add_argument("--repeat", type=int, default=3, help="rounds, each with another first vector")
    parser.add_argument("--peers", action="append", default=[], type=Path, help="a folder of packages; may be repeated")
    parser.add_argument("--machine", help="description of the machine, stored with the results")
    parser.add_argument("--worker", nargs=2, metavar=("TOOL", "BATCHES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path += [str(folder) for folder in args.peers]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PyHessian warns that a graph in .grad may leak memory
    if args.worker:
        print(json.dumps(memory_growth(args.worker[0], int(args.worker[1]))))
        return
    path = RESULTS / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    results["versions"] = {name: version(tool()) for name, tool in TOOLS.items()}
    results["torch"] = torch.__version__.partition("+")[0]
    results["machine"] = args.machine or results.get("machine", "an unknown machine")
    results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    for case in args.case or [*CASES, *DENSITIES, "memory"]:
        print(case, file=sys.stderr, flush=True)
        results["cases"][case] = measure_case(case, args.repeat, args.peers)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "table.md").write_text(render(results), encoding="utf-8")
    print(render(results))


def measure_case(case: str, repeat: int, peers: list[Path]) -> dict[str, Any]:
    """Measure one case; return its results."""
    if case in CASES:
        return measure_eigenvalue(*CASES[case], repeat)
    if case in DENSITIES:
        return measure_density(*DENSITIES[case], repeat)
    return measure_memory(peers)


def configurations(defaults: bool) -> list[Configuration]:
    """Return all available tools with tuned options, and if ``defaults`` with their default options as well."""
    available = [name for name, tool in TOOLS.items() if version(tool()) is not None]
    found = [Configuration(TOOLS[name](), TUNED[name], tuned=True) for name in available]
    return found + [Configuration(TOOLS[name]()) for name in available] * defaults


def measure_eigenvalue(width: int, batches: int, repeat: int) -> dict[str, Any]:
    """Time the largest eigenvalue, in turns; default options are measured only on a single batch."""
    problem = make_problem(width, batches)
    exact, rows = exact_lambda_max(problem), configurations(defaults=batches == 1)
    times, errors, products = ([[] for _ in rows] for _ in range(3))
    for turn in range(repeat):
        for i, row in enumerate(rows):
            begin = time.process_time()
            value, count = row.tool.lambda_max(problem, turn, **row.options)
            times[i].append(time.process_time() - begin)
            errors[i].append(abs(value / exact - 1))
            products[i].append(count)
    lines = [
        {
            "tool": row.tool.title,
            "settings": row.settings,
            "tuned": row.tuned,
            "error": max(errors[i]),
            "products": statistics.median(products[i]),
            **spread(times[i], times[0]),
        }
        for i, row in enumerate(rows)
    ]
    return {
        "kind": "lambda_max",
        "width": width,
        "batches": batches,
        "n": _num_weights(problem),
        "exact": exact,
        "rows": lines,
    }


def measure_density(width: int, batches: int, probes: int, num_iterations: int, repeat: int) -> dict[str, Any]:
    """Time the spectral density at equal numbers of probes and iterations, in turns."""
    problem, rows, failed = make_problem(width, batches), [], []
    for row in configurations(defaults=False):
        try:
            row.tool.density(problem, 0, 1, 2)
            rows.append(row)
        except Exception as error:  # a tool that does not support this version of torch
            failed.append({"tool": row.tool.title, "failed": f"{type(error).__name__}: {error}"[:80]})
    times: list[list[float]] = [[] for _ in rows]
    for turn in range(repeat):
        for i, row in enumerate(rows):
            begin = time.process_time()
            row.tool.density(problem, turn, probes, num_iterations)
            times[i].append(time.process_time() - begin)
    lines = [{"tool": row.tool.title, **spread(times[i], times[0])} for i, row in enumerate(rows)]
    shape = {
        "width": width,
        "batches": batches,
        "probes": probes,
        "num_iterations": num_iterations,
        "n": _num_weights(problem),
    }
    return {"kind": "density", **shape, "rows": lines + failed}


def measure_memory(peers: list[Path]) -> dict[str, Any]:
    """Measure the memory of two products beyond that of a training step, over more and more batches."""
    folders = [word for folder in peers for word in ("--peers", str(folder))]
    lines = []
    for name, tool in TOOLS.items():
        if version(tool()) is None:
            continue
        row: dict[str, Any] = {"tool": tool().title}
        for batches in MEMORY:
            command = [sys.executable, __file__, "--worker", name, str(batches), *folders]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row[str(batches)] = json.loads(done.stdout)
        lines.append(row)
    return {"kind": "memory", "width": 8, "rows": lines}


def memory_growth(name: str, batches: int) -> float:
    """Return the increase of this process's peak resident memory in MiB."""
    problem, tool = make_problem(8, batches, epochs=1), TOOLS[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tool.products(problem, 2)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _num_weights(problem: Problem) -> int:
    return sum(p.numel() for p in problem.parameters)


if __name__ == "__main__":
    main()
