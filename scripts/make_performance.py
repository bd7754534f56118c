"""Write the measured parts of docs/performance.md and docs/finetuning.md, and their images, from results/.

    python scripts/make_performance.py            after a benchmark has written a result
    python scripts/make_performance.py --check    writes nothing, and exits 1 if a page is out of date

A part of a page is between two comments, such as `<!-- begin step -->` and `<!-- end step -->`; the rest is written
by hand.
"""

from __future__ import annotations

import importlib
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
from gpu.measurements import load_all_seeds  # noqa: E402
from measured_parts import replace_parts, write_pages  # noqa: E402
from results import Result  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
FINETUNING = ROOT / "docs" / "finetuning.md"
IMAGES = PAGE.parent / "images"
GPU = "python benchmarks/gpu/run.py"
MEMORY = "python benchmarks/memory.py --lora"

Found = Sequence[Result]


@dataclass(frozen=True)
class Part:
    """One part of the page: how its results are loaded, rendered and drawn."""

    load: Callable[[Path], list[list[Result]]]
    """Take the folder of the results, and return those of each table, by device."""
    render: Callable[[Found], str]
    draw: Callable[[list[list[Result]], Path], object] | None = None
    caption: str = ""
    cpu: str | None = None
    """The command that measures it on a CPU; None if it is measured on a GPU only."""
    gpu: bool = True
    """True if it is measured on a GPU."""


def _each(name: str, folder: Path) -> list[list[Result]]:
    return [[result] for result in results.load(name, folder)]


def _render(name: str, found: Found) -> str:
    return str(importlib.import_module(f"{name}.table").render(found[0]))


def _render_recording(found: Found) -> str:
    return str(importlib.import_module("step.recording").render(found[0]))


def _draw(name: str, found: list[list[Result]], path: Path) -> object:
    return importlib.import_module(f"{name}.figure").draw([result for each in found for result in each], path)


def _render_all(name: str, found: Found) -> str:
    return str(importlib.import_module("gpu.table").RENDER[name](found))


def _draw_all(name: str, found: list[list[Result]], path: Path) -> object:
    return importlib.import_module("gpu.figure").draw(name, found[-1], path)


def _benchmark(name: str, caption: str = "", *, gpu: bool = True, cpu: bool = True) -> Part:
    draw = partial(_draw, name) if caption else None
    command = f"python benchmarks/{name}/run.py" if cpu else None
    return Part(partial(_each, name), partial(_render, name), draw, caption, command, gpu)


def _stage(name: str) -> Part:
    """Return the part of one stage of the search for presets."""
    stage, bfloat16, _ = name.removeprefix("presets_").partition("_bfloat16")
    command = " ".join(["python benchmarks/presets/run.py", stage, *(["--amp"] if bfloat16 else []), "SPEC ..."])
    return Part(partial(_each, name), partial(_render, "presets"), cpu=command, gpu=False)


def _training(name: str, caption: str = "") -> Part:
    draw = partial(_draw_all, name) if caption else None
    return Part(partial(load_all_seeds, name), partial(_render_all, name), draw, caption)


PARTS = {
    "step": _benchmark("step"),
    "recording": Part(
        partial(_each, "recording"), _render_recording, cpu="python benchmarks/step/recording.py", gpu=False
    ),
    "epoch": _benchmark("epoch", "Time of a step, in steps of its base, against batch size and against width"),
    "cpu": _benchmark("cpu", gpu=False),
    "presets_confirm_bfloat16": _stage("presets_confirm_bfloat16"),
    "loop": _benchmark("loop", cpu=False),
    "correctness": _training("correctness"),
    "article": _training(
        "article", "Training loss, accuracies and gap over standardized epochs, at the article's setting"
    ),
    "noisy-labels": _training("noisy-labels"),
    "annealed": _training("annealed", "Cost against test accuracy and gap with a cosine schedule, at full size"),
    "vit": _training("vit"),
    "precision": _training("precision"),
    "pareto": _training("pareto", "Cost against test accuracy and gap, at the article's setting"),
    "presets_search_bfloat16": _stage("presets_search_bfloat16"),
    "presets_confirm": _stage("presets_confirm"),
    "presets_larger_bfloat16": _stage("presets_larger_bfloat16"),
    "presets": _training("presets"),
}


def part(name: str, folder: Path) -> str:
    """Return the text between the comments of a part."""
    this = PARTS[name]
    found = this.load(folder)
    lines = [this.render(each).strip() for each in found]
    devices = {each[0].on_gpu for each in found}
    if found and this.draw:
        lines.append(f"![{this.caption}](images/{_image(name)})")
    if this.cpu and False not in devices:
        lines.append(f"Not yet measured on a CPU: `{this.cpu}`.")
    if this.gpu and True not in devices:
        lines.append(f"Not yet measured on a GPU: `{GPU}`.")
    return "\n\n".join(lines)


def page(text: str, folder: Path = results.RESULTS) -> str:
    """Return the page with all parts rendered again.

    Raises:
        ValueError: a part is missing, occurs twice, or is unknown.
    """
    return replace_parts(PAGE, text, {name: partial(part, name, folder) for name in PARTS})


def finetuning_page(text: str, folder: Path = results.RESULTS) -> str:
    """Return the page of fine-tuning with its part on memory rendered again: counted bytes, the same on all devices.

    Raises:
        ValueError: the part is missing, or occurs twice.
    """
    return replace_parts(FINETUNING, text, {"memory": partial(_memory, folder)})


def _memory(folder: Path) -> str:
    found = results.load("memory_lora", folder)
    return _render("lora_memory", found[-1:]).strip() if found else f"Not yet counted: `{MEMORY}`."


def draw(folder: Path = results.RESULTS, images: Path = IMAGES) -> list[Path]:
    """Draw the images of the parts that have results; return their files."""
    drawn = []
    for name, this in PARTS.items():
        found = this.load(folder)
        if not found or this.draw is None:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / _image(name)
            this.draw(found, path)
            drawn.append(Path(shutil.copyfile(path, images / path.name)))
    return drawn


def _image(name: str) -> str:
    return f"performance_{name}.png"


def main(words: Sequence[str] | None = None) -> int:
    """Write the pages, or with `--check` return 1 if one is out of date."""
    return write_pages(words, __file__, __doc__, {PAGE: page, FINETUNING: finetuning_page}, draw)


if __name__ == "__main__":
    sys.exit(main())
