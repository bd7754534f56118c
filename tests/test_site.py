"""The site of the documentation: the code of its tutorials runs, its pages have all public names, its links lead on."""

import ast
import json
import re
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import pytest

import steppe
from steppe import integrations
from steppe.flatness import Objective

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIALS = DOCS / "tutorials"


def run(sources: list[str], page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run blocks one after the other in a folder of their own, and return the names that they leave."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    assert sources
    for source in sources:
        exec(compile(source, str(page), "exec"), names)
    return names


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def cells(page: Path) -> list[str]:
    notebook = json.loads(page.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_start_page_runs(tmp_path, monkeypatch):
    names = run(blocks(DOCS / "index.md"), DOCS / "index.md", tmp_path, monkeypatch)
    assert names["optimizer"].report().perturbed_steps == 10


def test_first_step_shows_the_effect_of_sam(tmp_path, monkeypatch):
    page = TUTORIALS / "first-step.ipynb"
    names = run(cells(page), page, tmp_path, monkeypatch)
    assert names["sam"] > names["sgd"] + 0.05
    assert not names["optimizer"].report().hints


def test_fine_tuning_runs(tmp_path, monkeypatch):
    page = TUTORIALS / "fine-tuning.md"
    names = run(blocks(page), page, tmp_path, monkeypatch)
    assert names["sam"].report().perturbed_steps == 50


@pytest.mark.slow
def test_sharpness_of_the_tutorial_is_smaller_with_sam_at_equal_loss(tmp_path, monkeypatch):
    page = TUTORIALS / "is-it-flat.md"
    names = run(blocks(page), page, tmp_path, monkeypatch)
    assert all(isinstance(one, Objective) for one in names["objectives"].values())
    sgd, sam = (steppe.flatness.sharpness(one, rho=0.2) for one in names["objectives"].values())
    assert sam.value < 0.9 * sgd.value
    assert sam.loss == pytest.approx(sgd.loss, abs=0.01)


@pytest.mark.slow
def test_choosing_rho_runs_and_its_report_hints_at_the_ends(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    page = TUTORIALS / "choosing-rho.md"
    names = run(blocks(page), page, tmp_path, monkeypatch)
    hints = [bool(names["report"](rho).hints) for rho in (0.0001, 0.05, 20.0)]
    assert hints == [True, False, True]
    assert names["search"].best[0] == "base"


@pytest.mark.slow
def test_own_task_runs(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    page = TUTORIALS / "own-task.ipynb"
    names = run(cells(page), page, tmp_path, monkeypatch)
    assert names["search"].best[0] == "base"
    assert len(names["flatness"].verdicts) > 0


@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda page: page.stem)
def test_notebooks_are_committed_without_outputs(page):
    notebook = json.loads(page.read_text())
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")


def test_every_tutorial_is_listed_and_tested():
    listed = re.findall(r"^tutorials/(\S+)$", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in TUTORIALS.iterdir())
    strings = {node.value for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Constant)}
    assert {page.name for page in TUTORIALS.iterdir()} <= strings


# What the build generates


def extension(name: str) -> ModuleType:
    pytest.importorskip("sphinx")
    return __import__(name)


def test_every_public_module_and_name_is_documented_once(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    api_pages = extension("api_pages")
    public = {f"steppe.{name}" for name in steppe.__all__ if isinstance(getattr(steppe, name), ModuleType)}
    public -= {"steppe.methods", "steppe.integrations"}  # the pages of the methods; a page for each framework
    public |= {f"steppe.integrations.{m.name}" for m in iter_modules(integrations.__path__) if m.name[0] != "_"}
    assert public <= set(api_pages.MODULES)
    for framework in ("lightning", "transformers", "accelerate", "keras", "peft"):
        pytest.importorskip(framework)
    documented = api_pages.documented()
    assert "SAM" in documented["steppe"]
    for module_name, names in documented.items():
        page = api_pages.page(module_name, names)
        assert all(f":: {module_name}.{name}\n" in page for name in names)
    assert "L2" not in documented["steppe.rules"]
    assert api_pages.aliases()["steppe.rules.L2"] == "steppe.L2"
    assert {f"steppe.{name}" for name in documented["steppe"]} >= {f"steppe.{n}" for n in ("L2", "Pass", "citation")}


def test_constant_without_an_explanation_is_an_error():
    api_pages = extension("api_pages")
    with pytest.raises(ValueError, match="public nonesuch is not explained"):
        api_pages.data_text("nonesuch", object())


def test_links_out_of_the_documentation_lead_to_pages_and_sources():
    links = extension("repository_links")
    text = (
        '[a](../tests/test_mup.py\n  "test_x"), [b](../../README.md#caveats), [c](../../examples/plain_loop.py), '
        "[d](../verdicts.md#the-words), [e](https://a.b/c), [f](../nowhere.md)\n```\n[g](../../README.md)\n```\n"
    ).replace("../tests", "../../tests")
    assert links.expanded(text, "evidence/page") == (
        '[a](source:tests/test_mup.py#test_x "test_x"), [b](../index.md), [c](../examples/plain_loop.rst), '
        "[d](../verdicts.md#the-words), [e](https://a.b/c), [f](../nowhere.md)\n```\n[g](../../README.md)\n```\n"
    )


def test_included_file_gets_links_from_the_page_that_includes_it():
    links = extension("repository_links")
    text = links.expanded("```{include} ../../CONTRIBUTING.md\n```\n", "project/contributing")
    assert text.startswith("# Contributing")
    assert "](../versions.md)" in text
    assert "](docs/" not in text


def test_link_to_a_test_that_is_gone_is_an_error():
    links = extension("repository_links")
    assert links._line("tests/test_site.py", "test_link_to_a_test_that_is_gone_is_an_error").startswith("#L-")
    with pytest.raises(ValueError, match="no test 'test_gone'"):
        links._line("tests/test_site.py", "test_gone")


def test_plain_pages_of_notebooks_and_modules_have_their_code():
    plain = extension("plain_pages")
    text = plain.markdown(TUTORIALS / "first-step.ipynb", "tutorials/first-step")
    assert "```python\nimport torch\n" in text
    assert "(../examples/plain_loop.md)" in text
    start = plain.markdown(DOCS / "index.md", "index")
    assert "toctree" not in start
    assert "](_images/headline.png)" in start
    api = extension("api_pages").plain("steppe.mup", extension("api_pages").documented()["steppe.mup"])
    assert "## steppe.mup.parameter_groups(" in api


@pytest.mark.slow
def test_table_of_methods_is_sorted_by_a_click_and_filtered_by_words(tmp_path):
    pytest.importorskip("selenium")
    from browser import chromium

    heads, *rows = ("method cost", "SAM 2", "MSAM 1", "GAM 10", "AE-SAM about")
    cells = "".join(f"<tr><td>{row.replace(' ', '</td><td>')}</td></tr>" for row in rows)
    head = f"<tr><th>{heads.replace(' ', '</th><th>')}</th></tr>"
    table = f"<table class=sortable><thead>{head}</thead><tbody>{cells}</tbody></table>"
    script = (DOCS / "_static" / "table.js").read_text()
    (tmp_path / "page.html").write_text(f"<!doctype html><script>{script}</script>{table}")
    with chromium(tmp_path / "profile") as chrome:
        chrome.get((tmp_path / "page.html").as_uri())

        def shown() -> list[str]:
            return [row.text.split()[0] for row in chrome.find_elements("css selector", "tbody tr") if row.text]

        cost = chrome.find_elements("css selector", "th button")[1]
        cost.click()
        assert shown() == ["MSAM", "SAM", "GAM", "AE-SAM"]
        cost.click()
        assert shown() == ["AE-SAM", "GAM", "SAM", "MSAM"]
        chrome.find_element("tag name", "input").send_keys("sam 1")
        assert shown() == ["MSAM"]
        assert chrome.find_element("tag name", "output").text == "1 of 4"
