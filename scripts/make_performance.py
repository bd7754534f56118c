"""Make the measured parts of docs/performance.md, and its images, of what lies in results/.

    python scripts/make_performance.py            after a benchmark has written a result
    python scripts/make_performance.py --check    writes nothing, and exits 1 where the page is not what it should be

A part stands between two comments, `<!-- begin step -->` and `<!-- end step -->`; the rest is written by hand.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import results  # noqa: E402
from results import Result  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
IMAGES = PAGE.parent / "images"
GPU = "python benchmarks/gpu/run.py"

Found = Sequence[Result]


@dataclass(frozen=True)
class Part:
    """One part of the page: where its results are, and how they become Markdown and a picture."""

    load: Callable[[Path], list[list[Result]]]
    """Given the folder of the results: those that make one table, device by device."""
    render: Callable[[Found], str]
    draw: Callable[[list[list[Result]], Path], object] | None = None
    caption: str = ""
    cpu: str | None = None
    """The command that measures it on a CPU, where that makes sense."""
    gpu: bool = True
    """Whether it is to be measured on a GPU."""


def _each(name: str, folder: Path) -> list[list[Result]]:
    return [[result] for result in results.load(name, folder)]


def _render(name: str, found: Found) -> str:
    return str(importlib.import_module(f"{name}.table").render(found[0]))


def _draw(name: str, found: list[list[Result]], path: Path) -> object:
    return importlib.import_module(f"{name}.figure").draw([result for one in found for result in one], path)


def _all_seeds(name: str, folder: Path) -> list[list[Result]]:
    found: list[list[Result]] = importlib.import_module("gpu.figure").of_name(name, folder)
    return found


def _render_all(name: str, found: Found) -> str:
    return str(importlib.import_module("gpu.table").RENDER[name](found))


def _draw_all(name: str, found: list[list[Result]], path: Path) -> object:
    return importlib.import_module("gpu.figure").draw(name, found[-1], path)


def _benchmark(name: str, caption: str = "", *, gpu: bool = True, cpu: bool = True) -> Part:
    draw = partial(_draw, name) if caption else None
    command = f"python benchmarks/{name}/run.py" if cpu else None
    return Part(partial(_each, name), partial(_render, name), draw, caption, command, gpu)


def _stage(name: str) -> Part:
    """A stage of the search for presets; the last one has the article's setting, and is the list's."""
    stage, halves, _ = name.removeprefix("presets_").partition("_bfloat16")
    command = " ".join(["python benchmarks/presets/run.py", stage, *(["--amp"] if halves else []), "SPEC ..."])
    return Part(partial(_each, name), partial(_render, "presets"), cpu=command, gpu=False)


def _training(name: str, caption: str = "") -> Part:
    draw = partial(_draw_all, name) if caption else None
    return Part(partial(_all_seeds, name), partial(_render_all, name), draw, caption)


PARTS = {
    "step": _benchmark("step"),
    "epoch": _benchmark("epoch", "Time of a step, in steps of its base, against batch size and against width"),
    "cpu": _benchmark("cpu", gpu=False),
    "presets_confirm_bfloat16": _stage("presets_confirm_bfloat16"),
    "loop": _benchmark("loop", cpu=False),
    "correctness": _training("correctness"),
    "article": _training(
        "article", "Training loss, accuracies and gap over standardized epochs, at the article's setting"
    ),
    "precision": _training("precision"),
    "pareto": _training("pareto", "Cost against test accuracy and gap, at the article's setting"),
    "presets_search_bfloat16": _stage("presets_search_bfloat16"),
    "presets_confirm": _stage("presets_confirm"),
    "presets_larger_bfloat16": _stage("presets_larger_bfloat16"),
    "presets": _training("presets"),
}


def part(name: str, folder: Path) -> str:
    """What stands between the comments of a part."""
    about = PARTS[name]
    found = about.load(folder)
    lines = [about.render(one).strip() for one in found]
    devices = {one[0].on_gpu for one in found}
    if found and about.draw:
        lines.append(f"![{about.caption}](images/{_image(name)})")
    if about.cpu and False not in devices:
        lines.append(f"Not yet measured on a CPU: `{about.cpu}`.")
    if about.gpu and True not in devices:
        lines.append(f"Not yet measured on a GPU: `{GPU}`.")
    return "\n\n".join(lines)


def page(text: str, folder: Path = results.RESULTS) -> str:
    """The page with each part made anew; ValueError where a part is not there exactly once."""
    for name in PARTS:
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"{PAGE}: it must have {begin} and then {end}, once each: what is measured stands between")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{part(name, folder)}\n\n{end}{rest.partition(end)[2]}"
    unknown = set(re.findall(r"<!-- begin (\S+) -->", text)) - set(PARTS)
    if unknown:
        raise ValueError(f"{PAGE}: nothing makes {', '.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    return text


def draw(folder: Path = results.RESULTS, images: Path = IMAGES) -> list[Path]:
    """Draw the pictures of the parts that have results; return them."""
    drawn = []
    for name, about in PARTS.items():
        found = about.load(folder)
        if not found or about.draw is None:
            continue
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / _image(name)
            about.draw(found, path)
            drawn.append(Path(shutil.copyfile(path, images / path.name)))
    return drawn


def _image(name: str) -> str:
    return f"performance_{name}.png"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is stale")
    args = parser.parse_args(words)
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if args.check:
        if before != after:
            print("docs/performance.md is stale: run python scripts/make_performance.py", file=sys.stderr)
        return int(before != after)
    for file in draw():
        print(file)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
