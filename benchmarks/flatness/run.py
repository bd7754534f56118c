"""The time to lambda_max and to the spectral density, and the memory, of Steppe and of other packages.

    python benchmarks/flatness/run.py                                    all cases, with the tools that are installed
    python benchmarks/flatness/run.py --case one-8 --repeat 5            a case
    python benchmarks/flatness/run.py --peers DIR --peers CHECKOUT       packages in folders besides

A folder is one of ``pip install --no-deps --target DIR hessian-eigenthings==1.0.0a5``, or a checkout, such as that of
github.com/amirgholami/PyHessian; results/ is of its commit de8cf23, since the density of its release 0.1 needs
``torch.eig``, which torch has no more.

All tools measure the same network, a PreAct ResNet-18 in evaluation mode, in float32, on the same images, in one
process and one thread, in turns. Times are processor time, so that what else the machine does counts little; quote the
ratios. "Tuned" are the cheapest settings found for each tool with which lambda_max is within 1e-3 of float64's in every
round of the first case; the tool that has no stopping rule is told how many steps do it, which its user would not know.
They are kept for the other cases. The error is the worst of all rounds, and marked where it is above 1e-3.
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

from flatness.problem import Problem, exact, problem  # noqa: E402
from flatness.table import render  # noqa: E402
from flatness.tools import TOOLS, Method, version  # noqa: E402
from timing import spread  # noqa: E402

RESULTS = HERE / "results"
CASES = {"one-8": (8, 1), "one-16": (16, 1), "many-8": (8, 8)}  # width, batches
DENSITIES = {"density-one": (8, 1, 2, 16), "density-many": (8, 4, 2, 8)}  # width, batches, probes, steps
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
    parser.add_argument("--machine", help="what the results say they were measured on")
    parser.add_argument("--worker", nargs=2, metavar=("TOOL", "BATCHES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path += [str(folder) for folder in args.peers]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PyHessian's, that .grad with a graph may leak
    if args.worker:
        print(json.dumps(growth(args.worker[0], int(args.worker[1]))))
        return
    path = RESULTS / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    results["versions"] = {name: version(tool()) for name, tool in TOOLS.items()}
    results["torch"] = torch.__version__.partition("+")[0]
    results["machine"] = args.machine or results.get("machine", "not said")
    results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    for case in args.case or [*CASES, *DENSITIES, "memory"]:
        print(case, file=sys.stderr, flush=True)
        results["cases"][case] = measured(case, args.repeat, args.peers)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "table.md").write_text(render(results), encoding="utf-8")
    print(render(results))


def measured(case: str, repeat: int, peers: list[Path]) -> dict[str, Any]:
    """Run a case."""
    if case in CASES:
        return eigenvalue(*CASES[case], repeat)
    if case in DENSITIES:
        return densities(*DENSITIES[case], repeat)
    return memory(peers)


def methods(defaults: bool) -> list[Method]:
    """All tools that are here with tuned settings, and by default as they come."""
    here = [name for name, tool in TOOLS.items() if version(tool()) is not None]
    found = [Method(TOOLS[name](), TUNED[name], tuned=True) for name in here]
    return found + [Method(TOOLS[name]()) for name in here] * defaults


def eigenvalue(width: int, batches: int, repeat: int) -> dict[str, Any]:
    """The largest eigenvalue, in turns; as they come, the tools are asked where there is one batch."""
    at = problem(width, batches)
    true, rows = exact(at), methods(defaults=batches == 1)
    times, errors, products = ([[] for _ in rows] for _ in range(3))
    for turn in range(repeat):
        for i, row in enumerate(rows):
            begin = time.process_time()
            value, count = row.tool.lambda_max(at, turn, **row.options)
            times[i].append(time.process_time() - begin)
            errors[i].append(abs(value / true - 1))
            products[i].append(count)
    lines = [
        {
            "tool": row.tool.title,
            "settings": row.told,
            "tuned": row.tuned,
            "error": max(errors[i]),
            "products": statistics.median(products[i]),
            **spread(times[i], times[0]),
        }
        for i, row in enumerate(rows)
    ]
    return {"kind": "lambda_max", "width": width, "batches": batches, "n": _n(at), "exact": true, "rows": lines}


def densities(width: int, batches: int, probes: int, steps: int, repeat: int) -> dict[str, Any]:
    """The spectral density with as many probes and steps, in turns."""
    at, rows, failed = problem(width, batches), [], []
    for row in methods(defaults=False):
        try:
            row.tool.density(at, 0, 1, 2)
            rows.append(row)
        except Exception as error:  # of a tool that this torch is too new for
            failed.append({"tool": row.tool.title, "failed": f"{type(error).__name__}: {error}"[:80]})
    times: list[list[float]] = [[] for _ in rows]
    for turn in range(repeat):
        for i, row in enumerate(rows):
            begin = time.process_time()
            row.tool.density(at, turn, probes, steps)
            times[i].append(time.process_time() - begin)
    lines = [{"tool": row.tool.title, **spread(times[i], times[0])} for i, row in enumerate(rows)]
    shape = {"width": width, "batches": batches, "probes": probes, "steps": steps, "n": _n(at)}
    return {"kind": "density", **shape, "rows": lines + failed}


def memory(peers: list[Path]) -> dict[str, Any]:
    """What a process grows by, beyond a training step, in two products over more and more batches."""
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


def growth(name: str, batches: int) -> float:
    """MiB by which the peak of this process's resident memory rises."""
    at, tool = problem(8, batches, epochs=1), TOOLS[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tool.products(at, 2)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _n(at: Problem) -> int:
    return sum(p.numel() for p in at.parameters)


if __name__ == "__main__":
    main()
