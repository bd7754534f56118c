"""Build the source distribution, and the wheel from it, and check both as a user gets them.

    python scripts/release_check.py

Each is installed in a new environment that has nothing else. There, in an empty folder, the programs of README.md run;
then the extra `experiments` is added, and a comparison of seconds runs. The files are left in dist/.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readme_blocks import README, programs

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
PACKAGE = ROOT / "src" / "steppe"
LARGEST_WHEEL = 1_000_000  # bytes
COMPARISON = (
    *("compare", "demo", "--seeds", "1", "--epochs", "1", "--eval-every", "1"),
    *("--width", "2", "--runs-at-once", "1", "--out", "run"),
)


def files_of_package() -> set[str]:
    """Return the files that a wheel has, without its metadata: all of the package but the sample of images."""
    found = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file())
    return {str(path) for path in found if not {"__pycache__", "sample"} & set(path.parts)}


def problems_of_wheel(names: Sequence[str], size: int) -> list[str]:
    """Return what is wrong with a wheel that has these files and this many bytes."""
    expected, has = files_of_package(), {name for name in names if ".dist-info/" not in name}
    large = f"it has {size / 1e6:.1f} MB: those who only want the optimizer should not load more than 1 MB"
    return [
        *(f"{name} is missing" for name in sorted(expected - has)),
        *(f"{name} does not belong there" for name in sorted(has - expected)),
        *([large] if size > LARGEST_WHEEL else []),
    ]


def left_to_do(project: Mapping[str, Any], *, dirty: bool) -> list[str]:
    """Return what only a person can do before and after publishing."""
    address = "name the repository's address in [project.urls] of pyproject.toml: README's links are made from it"
    return [
        *(["commit the uncommitted changes, which are in these files"] if dirty else []),
        *([address] if "Repository" not in project["urls"] else []),
        f"tag the commit v{project['version']}, and publish both files of dist/",
    ]


def build(folder: Path) -> list[Path]:
    """Build the files of the tree without what git does not track; return the source distribution and the wheel."""
    source = folder / "source"
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if (path := ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / name)
    python = new_environment(folder / "build")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    run([python, "-m", "pip", "install", "--quiet", *requires])
    shutil.rmtree(DIST, ignore_errors=True)
    backend = f"from setuptools import build_meta; print(build_meta.build_sdist({str(DIST)!r}))"
    sdist = DIST / run([python, "-c", backend], cwd=source).splitlines()[-1]
    wheel = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", DIST]
    run([*wheel, sdist])
    return [sdist, *DIST.glob("*.whl")]


def check(file: Path, folder: Path) -> None:
    """Install a file in a new environment, run the README's programs, and a comparison."""
    python = new_environment(folder / f"env-{file.suffix[1:]}")
    elsewhere = folder / f"empty-{file.suffix[1:]}"
    elsewhere.mkdir()
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run([*install, file])
    for extra in ("numpy", "matplotlib"):
        if subprocess.run([python, "-c", f"import {extra}"], capture_output=True).returncode == 0:
            raise SystemExit(f"{file.name} installs {extra}, and the optimizer needs torch alone")
    readme = elsewhere / "readme.py"
    # torch warns once that NumPy, which this environment does not have, is missing
    readme.write_text("\n".join(programs(README.read_text(encoding="utf-8"))), encoding="utf-8")
    run([python, "-W", "error", "-W", "ignore:Failed to initialize NumPy", readme], cwd=elsewhere)
    run([*install, f"{file}[experiments]"])
    steppe = python.with_name("steppe")
    print(run([steppe, "--version"], cwd=elsewhere).strip())
    run([steppe, *COMPARISON], cwd=elsewhere)
    for name in ("summary.md", "report.html"):
        if not (elsewhere / "run" / name).is_file():
            raise SystemExit(f"steppe {' '.join(COMPARISON)} wrote no {name}")


def new_environment(folder: Path) -> Path:
    """Make a virtual environment; return its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    return folder / "bin" / "python"


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run a command without what this repository sets; return its output, or end with it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nThis failed, with {done.returncode}: {' '.join(words)}")
    return done.stdout


def main() -> int:
    """Run all checks; return 1 if one fails."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory() as name:
        files = build(Path(name))
        for file in files:
            print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB", flush=True)
        with zipfile.ZipFile(files[1]) as archive:
            problems = problems_of_wheel(archive.namelist(), files[1].stat().st_size)
        for problem in problems:
            print(f"{files[1].name}: {problem}", file=sys.stderr)
        if problems:
            return 1
        for file in files:
            check(file, Path(name))
            print(f"{file.name}: installed alone, README's programs and a comparison run", flush=True)
    dirty = bool(subprocess.check_output(["git", "status", "--porcelain"], cwd=ROOT))
    print("Left to do by hand:", *(f"- {line}" for line in left_to_do(project, dirty=dirty)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
