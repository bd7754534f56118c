"""The documentation: its Python blocks run, its links have targets, and its contract page is current."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import make_contract
import steppe

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


@pytest.mark.parametrize(
    "page",
    [
        "CONTRIBUTING.md",
        "docs/limits.md",
        "docs/extending.md",
        "docs/flatness.md",
        "docs/averaging.md",
        "docs/tuning.md",
    ],
)
def test_python_blocks_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    # A registered module, because dataclasses look up their module in sys.modules.
    names = vars(sys.modules.setdefault("page", types.ModuleType("page")))
    names |= {"model": torch.nn.Linear(2, 1)}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    result = names["everything"].measures if page == "docs/flatness.md" else names["optimizer"].perturbation
    assert result is not None


def test_float16_block_of_the_integrations_page_runs():
    page = (ROOT / "docs/integrations.md").read_text()
    (block,) = re.findall(r"^```python\n([^`]*GradScaler[^`]*)^```", page, flags=re.MULTILINE)
    names = {"torch": torch, "steppe": steppe}
    exec(compile(block, "docs/integrations.md", "exec"), names)
    assert names["optimizer"].report().steps == 10


def test_links_to_files_and_headings_have_targets():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target, anchor in re.findall(r'\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?(?:\s+"[^"]*")?\)', text):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), (page, target)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in slugs, (page, anchor)


def test_contract_page_is_current():
    assert make_contract.main(["--check"]) == 0, "run python scripts/make_contract.py"


def test_stale_contract_page_is_found(tmp_path, monkeypatch, capsys):
    page = tmp_path / "contract.md"
    page.write_text("**C1.** A statement.\n\nTests: none yet.\n")
    monkeypatch.setattr(make_contract, "PAGE", page)
    monkeypatch.setattr(make_contract, "find_tests", lambda: {"C1": "[test_one](../tests/test_one.py)"})
    assert make_contract.main(["--check"]) == 1
    assert "out of date: contract.md; run python scripts/make_contract.py" in capsys.readouterr().err
    assert make_contract.main([]) == 0
    assert "Tests: [test_one](../tests/test_one.py)." in page.read_text()
    assert make_contract.main(["--check"]) == 0
