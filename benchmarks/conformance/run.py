"""Measure the contract's statements for Steppe and its peers: ``python benchmarks/conformance/run.py``.

Without arguments it sets up the environments, measures everything, and writes results.json and docs/conformance.md.
With ``--only`` or ``--statement`` it prints what it measures, writes nothing, and exits 1 if a statement fails.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from conformance.catalog import CATALOG  # noqa: E402
from conformance.peers import ENVIRONMENTS, LEFT_OUT, PEERS, ROOT, TORCH, Peer  # noqa: E402
from conformance.table import MARKS, render  # noqa: E402

RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "conformance.md"
PREFIX = "@@ "  # marks the lines that a worker prints for this process; the packages that it imports may print others


def main() -> int:
    """Measure, list the statements, or render the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PEERS, help="an implementation; may be repeated")
    parser.add_argument("--statement", action="append", help="C6 or C6a; may be repeated")
    parser.add_argument("--classic", type=Path, help="a checkout of github.com/davda54/sam")
    parser.add_argument(
        "--venv", type=Path, default=ROOT / "build" / "conformance", help="the folder of the environments"
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one implementation")
    parser.add_argument("--peers", action="store_true", help="list the implementations and the statements")
    parser.add_argument("--render", action="store_true", help="only render the page from results.json")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers:
        print("\n".join([*PEERS, "", *(f"{id:5} {sentence}" for id, sentence in CATALOG.items())]))
        return 0
    if args.render:
        PAGE.write_text(render(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    ids = matching(args.statement)
    if args.worker:
        work(args.worker, ids)
        return 0
    keys = args.only or [key for key in PEERS if key != "classic" or args.classic]
    if "classic" in keys and (args.classic is None or not (args.classic / "sam.py").is_file()):
        parser.error("the classic implementation needs a checkout of github.com/davda54/sam: give --classic PATH")
    found = {key: measure(PEERS[key], ids, args) for key in keys}
    if args.only or args.statement:
        return show(found)
    results = collect(found, ids)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(render(results), encoding="utf-8")
    show(found)
    print(f"\nwrote {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return int(any(cell["status"] != "holds" for cell in found.get("steppe", {"cells": {}})["cells"].values()))


def matching(wanted: list[str] | None) -> list[str]:
    """Return the selected statements; C6 selects C6a, C6b, ..."""
    if not wanted:
        return list(CATALOG)
    ids = [id for id in CATALOG if id in wanted or id.rstrip("abcdefgh") in wanted]
    if not ids:
        raise SystemExit(f"no statement is called {' or '.join(wanted)}: --peers lists them")
    return ids


def work(key: str, ids: list[str]) -> None:
    """Run statements in this process, and print one line each."""
    from conformance.adapters import load
    from conformance.check import check

    peer = load(key)
    about = {name: getattr(peer, name) for name in ("title", "version", "docs", "usage")}
    print(PREFIX + json.dumps(about), flush=True)
    for id in ids:
        print(PREFIX + json.dumps({"id": id, **check(peer, id)}), flush=True)


def measure(peer: Peer, ids: list[str], args: argparse.Namespace) -> dict:
    """Measure statements in an implementation's environment.

    A statement that crashes its process, or hangs, fails. The remaining ones are measured in a new process.
    """
    print(f"{peer.title} ...", file=sys.stderr, flush=True)
    about: dict = {"title": peer.title, "cells": {}}
    try:
        python = environment(peer.environment, args.venv)
    except subprocess.CalledProcessError as error:
        return {**about, "failed": f"pip install: {last_line(error.stderr)}"}
    # one thread, so that sums are the same on every machine
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "PYTHONWARNINGS": "ignore"}
    if args.classic:
        variables["CONFORMANCE_CLASSIC"] = str(args.classic.resolve())
    todo = list(ids)
    while todo:
        command = [str(python), str(HERE / "run.py"), "--worker", peer.key]
        command += [word for id in todo for word in ("--statement", id)]
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=args.timeout)
            output, end = done.stdout, f"exit status {done.returncode}"
        except subprocess.TimeoutExpired as timeout:
            output, end, done = (timeout.stdout or b"").decode(), f"no answer in {args.timeout:.0f} s", None
        answers = [json.loads(line[len(PREFIX) :]) for line in output.splitlines() if line.startswith(PREFIX)]
        if not answers:
            return {**about, "failed": last_line(done.stderr) if done else end}
        about |= answers[0]
        for cell in answers[1:]:
            about["cells"][cell.pop("id")] = cell
        todo = [id for id in todo if id not in about["cells"]]
        if todo:
            about["cells"][todo.pop(0)] = {"status": "fails", "measured": end, "expected": "an answer"}
    return about


def environment(name: str, folder: Path) -> Path:
    """Create a virtual environment, unless it is up to date, and return its interpreter."""
    installs = ENVIRONMENTS[name].installs
    home = folder / name
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = home / f"ready-{hashlib.sha256(repr(installs).encode()).hexdigest()[:12]}"
    if not ready.exists():
        print(f"  creating {home}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        for words in installs:
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
            subprocess.run(pip, check=True, capture_output=True, text=True)
        ready.touch()
    return python


def last_line(text: str) -> str:
    """Return the last line of an error message."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def collect(found: dict[str, dict], ids: list[str]) -> dict:
    """Return the content of results.json."""
    for key, about in found.items():
        for id, cell in about["cells"].items():
            if cell["status"] in ("fails", "limitation"):
                cell["reproduce"] = f"python benchmarks/conformance/run.py --only {key} --statement {id}"
                cell["reproduce"] += " --classic PATH" if key == "classic" else ""
        about["environment"] = ENVIRONMENTS[PEERS[key].environment].note
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": cpu(),
            "python": platform.python_version(),
            "torch": f"{TORCH.split('==')[1]}, CPU, one thread",
        },
        "statements": {id: CATALOG[id] for id in ids},
        "implementations": found,
        "left_out": [*LEFT_OUT],
    }


def cpu() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(found: dict[str, dict]) -> int:
    """Print every cell; return 1 if a statement fails."""
    failed = False
    for key, about in found.items():
        print(f"\n{about['title']} {about.get('version', '')}  ({key})")
        if "failed" in about:
            print(f"  not measured: {about['failed']}")
            failed = True
        for id, cell in about["cells"].items():
            measured = cell.get("error") or cell.get("measured") or cell.get("reason", "")
            expected = f"   expected: {cell['expected']}" if cell["status"] in ("fails", "limitation") else ""
            print(f"  {MARKS[cell['status']]} {id:5} {CATALOG[id]}\n          measured: {measured}{expected}")
            if cell["status"] == "limitation":
                print(f"          its documentation: {cell['reason']} ({cell['link']})")
            failed |= cell["status"] in ("fails", "limitation")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
