"""scripts/make_performance.py: docs/performance.md shows the content of results/."""

import json
import re
from pathlib import Path

import pytest

import make_performance
import results
from make_performance import GPU, PARTS, Part

ROOT = Path(__file__).parents[2]

TEXT = "before\n<!-- begin one -->\nold\n<!-- end one -->\nafter\n"


@pytest.fixture
def one(tmp_path, monkeypatch):
    """A page with a single part, and a function that writes a result of it."""

    def render(found):
        (result,) = found
        return f"| {result.data['value']} |\n\n{result.source}\n"

    def draw(found, path):
        path.write_text(" ".join(str(result.data["value"]) for (result,) in found))

    part = Part(lambda folder: [[r] for r in results.load("one", folder)], render, draw, "a picture", "python cpu.py")
    monkeypatch.setattr(make_performance, "PARTS", {"one": part})

    def measured(device: str, value: int, *, on_gpu: bool, tiny: bool = False) -> None:
        data = {"date": "2026-11-23", "command": "python run.py", "torch": "2.13.0", "versions": {}, "tiny": tiny}
        path = tmp_path / device / "one.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data | {"device": device, "on_gpu": on_gpu, "data": {"value": value}}))

    return measured


def test_page_is_up_to_date():
    text = make_performance.PAGE.read_text(encoding="utf-8")
    assert make_performance.page(text) == text, "run python scripts/make_performance.py"


def test_memory_on_the_page_of_finetuning_is_up_to_date(tmp_path):
    text = make_performance.FINETUNING.read_text(encoding="utf-8")
    assert make_performance.finetuning_page(text) == text, "run python scripts/make_performance.py"
    assert "Not yet counted: `python benchmarks/memory.py --lora`." in make_performance.finetuning_page(text, tmp_path)


def test_links_of_the_page_exist():
    text = make_performance.PAGE.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    assert [link for link in sorted(links) if not (make_performance.PAGE.parent / link).exists()] == []


def test_commands_of_the_page_name_existing_scripts():
    text = make_performance.PAGE.read_text(encoding="utf-8")
    scripts = set(re.findall(r"python ((?:benchmarks|scripts)/\S+\.py)", text))
    assert {"benchmarks/gpu/run.py", "benchmarks/step/run.py", "benchmarks/epoch/run.py"} < scripts
    assert [script for script in sorted(scripts) if not (ROOT / script).is_file()] == []


def test_page_lists_missing_measurements(one, tmp_path):
    nothing = make_performance.page(TEXT, tmp_path)
    assert nothing == (
        "before\n<!-- begin one -->\n\nNot yet measured on a CPU: `python cpu.py`.\n\n"
        f"Not yet measured on a GPU: `{GPU}`.\n\n<!-- end one -->\nafter\n"
    )
    one("a rehearsal", 1, on_gpu=True, tiny=True)
    assert make_performance.page(TEXT, tmp_path) == nothing
    one("a-cpu", 2, on_gpu=False)
    some = make_performance.page(TEXT, tmp_path)
    assert "on a CPU" not in some
    assert some.index("| 2 |") < some.index("![a picture](images/performance_one.png)") < some.index("on a GPU")
    one("a-gpu", 3, on_gpu=True)
    every = make_performance.page(some, tmp_path)
    assert "Not yet" not in every
    assert "a-gpu, torch 2.13.0, 2026-11-23; `python run.py`" in every
    assert every.index("| 2 |") < every.index("| 3 |")
    assert make_performance.page(every, tmp_path) == every


def test_image_shows_all_devices(one, tmp_path):
    (tmp_path / "images").mkdir()
    assert make_performance.draw(tmp_path, tmp_path / "images") == []
    one("a-gpu", 3, on_gpu=True)
    one("a-cpu", 2, on_gpu=False)
    (image,) = make_performance.draw(tmp_path, tmp_path / "images")
    assert (image.name, image.read_text()) == ("performance_one.png", "2 3")


@pytest.mark.usefixtures("one")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "must contain <!-- begin one --> and then <!-- end one -->"),
        (TEXT * 2, "once each"),
        ("<!-- end one --><!-- begin one -->", "and then"),
        (f"{TEXT}<!-- begin two -->", "has unknown parts two; known are one"),
    ],
)
def test_page_with_wrong_parts_is_an_error(text, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_performance.page(text, tmp_path)


@pytest.mark.usefixtures("one")
def test_outdated_page_is_detected_and_rewritten(tmp_path, monkeypatch, capsys):
    page = tmp_path / "performance.md"
    page.write_text(TEXT)
    monkeypatch.setattr(make_performance, "PAGE", page)
    finetuning = tmp_path / "finetuning.md"
    finetuning.write_text("<!-- begin memory -->\n\nold\n\n<!-- end memory -->")
    monkeypatch.setattr(make_performance, "FINETUNING", finetuning)
    assert make_performance.main(["--check"]) == 1
    assert "out of date: performance.md, finetuning.md; run python scripts/make" in capsys.readouterr().err
    assert page.read_text() == TEXT
    assert make_performance.main([]) == 0
    assert make_performance.main(["--check"]) == 0
    assert page.read_text() != TEXT


def test_page_has_all_parts_in_order():
    text = make_performance.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"<!-- begin (\S+) -->", text) == list(PARTS)
