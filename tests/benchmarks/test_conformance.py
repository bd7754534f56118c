"""benchmarks/conformance: every statement holds for Steppe, statements can fail, and the page shows the results."""

import json
from pathlib import Path

import pytest

from conformance import adapters, check, statements, table
from conformance.adapters.base import Adapter, Session
from conformance.catalog import CATALOG, REMARKS
from conformance.statements import perturbation
from conformance.statements.registry import FUNCTIONS

ROOT = Path(__file__).resolve().parents[2]

RESULTS = json.loads((ROOT / "benchmarks" / "conformance" / "results.json").read_text(encoding="utf-8"))
CELLS = [(key, id, cell) for key, about in RESULTS["implementations"].items() for id, cell in about["cells"].items()]


@pytest.mark.parametrize("id", CATALOG)
def test_statement_holds_for_steppe(id, monkeypatch):
    monkeypatch.setattr(perturbation, "LARGE", 2_000_000)  # the tests of the tensor operations have the large norms
    cell = check.check(adapters.load("steppe"), id)
    assert cell["status"] == "holds", cell


class NoSam(Adapter):
    """The base optimizer in place of SAM."""

    def build(self, model, base, rho=0.05, *, clip=None, state=None):
        return Session(model, base.make(model.parameters(), state), clip=clip)


class ByHand(Session):
    """The four lines of the method, and nothing else."""

    def take(self, losses):
        closure = self.closure(losses)
        loss = closure()
        params = [p for p in self.model.parameters() if p.grad is not None]
        perturbation = [0.05 * p.grad / sum(q.grad.square().sum() for q in params).sqrt() for p in params]
        for p, e in zip(params, perturbation, strict=True):
            p.data += e
        closure()
        for p, e in zip(params, perturbation, strict=True):
            p.data -= e
        self.optimizer.step()
        return loss


class Naive(NoSam):
    def build(self, model, base, rho=0.05, *, clip=None, state=None):
        return ByHand(model, base.make(model.parameters(), state), clip=clip)


@pytest.mark.parametrize("id", ["C0", "C8a", "C11c", "C16"])
def test_statement_fails_without_sam(id):
    assert check.check(NoSam(), id)["status"] == "fails"


@pytest.mark.parametrize("id", ["C6a", "C6b", "C7a", "C10a", "C11a", "C14a", "C14b", "C14c", "C15a", "C15b", "C18"])
def test_statement_fails_for_a_naive_implementation(id):
    assert check.check(Naive(), id)["status"] == "fails"


def test_table_has_every_statement():
    assert list(statements.STATEMENTS) == list(CATALOG)
    assert set(FUNCTIONS) == set(CATALOG)
    assert set(REMARKS) <= set(CATALOG)
    assert RESULTS["statements"] == CATALOG
    for about in RESULTS["implementations"].values():
        assert list(about["cells"]) == list(CATALOG) or about["failed"]


def test_cells_have_commands_links_and_reasons():
    for key, id, cell in CELLS:
        if cell["status"] in ("fails", "limitation"):
            assert cell["reproduce"].startswith(
                f"python benchmarks/conformance/run.py --only {key} --statement {id}"
            ), (key, id)
        if cell["status"] == "limitation":
            assert cell["link"].startswith("https://"), (key, id)
        if cell["status"] == "n/a":
            assert cell["reason"], (key, id)


def test_published_statements_hold_for_steppe():
    assert {cell["status"] for key, _, cell in CELLS if key == "steppe"} == {"holds"}


def test_page_shows_the_results():
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert page == table.render(RESULTS), "run python benchmarks/conformance/run.py --render"
