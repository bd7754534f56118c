"""The method cards: complete, in agreement with the code, and with what was measured."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from steppe import closures, papers, variants
from steppe.methods import cards
from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.storage.run_folder import METRICS, RunFolder
from steppe.experiments.training.evaluation import Record, write_records
from steppe.methods.cards import card
from steppe.methods.registry import CARDS

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import make_cards  # noqa: E402
import memory  # noqa: E402

EXTRA = {"ascent_steps", "fraction_sam", "micro_batch_sam"}
each = pytest.mark.parametrize("name", CARDS)

# What a short training has to be told, and what a test's data are like.
SHORT = {
    "dynamic_sparse_sam": {"steps": 20},
    "late_sam": {"steps": 20},
    "random_sam": {"p": 1.0},
    "aesam": {"steps": 20},
    "saf": {"samples": 8, "classes": 3, "start": 1, "epochs_ago": 1},
    "mesa": {"start": 0, "beta": 0.5},
}
# What is no hyperparameter: what is trained, where and how it runs.
NOT_TUNED = {
    *("base_optimizer", "params", "model", "optimizer", "kwargs", "group", "dtype", "seed", "replay_rng"),
    *("loss", "losses", "batch", "rule"),
}


class Counting(nn.Module):
    """Counts the samples that go through: whole ones with a backward to come, thirds without."""

    seen: list[float] = []  # noqa: RUF012 (MESA's copy counts here too)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        self.seen.append(len(x) * (1.0 if torch.is_grad_enabled() else 1 / 3))
        return self.layers(x)


def test_every_variant_has_a_card():
    public = {n for n, f in vars(variants).items() if inspect.isfunction(f) and f.__module__ == variants.__name__}
    assert set(CARDS) == {name for name in public if not name.startswith("_")} | EXTRA


def test_every_contender_belongs_to_one_card_and_has_its_label():
    for name, method in METHODS.items():
        cards = [method for method in CARDS.values() if method.covers(name)]
        assert len(cards) == (0 if method.plain else 1)
        assert all(method.label == method.label for method in cards)
    assert CARDS["ascent_steps"].covers("asam:rho=0.5,steps=3")


@each
def test_the_cost_is_what_is_counted(name):
    method = CARDS[name]
    torch.manual_seed(0)
    network, steps = Counting(), 20
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    base = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    given = SHORT.get(name, {})
    step = memory.stepper(
        method, base, network, lambda logits, y: F.cross_entropy(logits, y, reduction="none"), (x, y), **given
    )
    network.seen.clear()
    for _ in range(steps):
        step()
    counted = sum(network.seen) / (len(x) * steps)
    if method.passes is None:
        assert 1.0 < counted < 2.0
        return
    given = given | {"fraction_sam": {"fraction": 0.5}}.get(name, {})
    assert counted == pytest.approx(method.cost_with(**given))


@each
def test_the_cost_is_what_the_experiments_plan(name):
    method = CARDS[name]
    for key, method in METHODS.items():
        if method.covers(key) and method.passes is not None:
            assert method.cost_with() == pytest.approx(float(method.cost({})), abs=1e-4)


@each
def test_the_lines_that_use_it_run_and_cite_the_papers(name):
    method = CARDS[name]
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(32, 6), torch.randint(10, (32,))
    scope = {
        **{"steppe": steppe, "F": F, "torch": torch, "base": base, "model": model, "x": x, "y": y, "epoch": 0},
        **{"logits": model(x), "indices": torch.arange(32)},
        "losses": lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
        "loss": lambda x, y: F.cross_entropy(model(x), y),
    }
    exec(method.usage, scope)
    parts = [scope.get("optimizer", base), *(scope[n] for n in ("saf", "mesa") if n in scope)]
    parts += [getattr(closures, n) for n in re.findall(r"steppe\.closures\.(\w+)", method.usage)]
    assert {p for part in parts for p in papers.papers_of(part)} >= set(method.papers) - {papers.SAM}
    assert method.paper in method.papers
    assert method.paper.url in card(name)
    assert method.paper.key in method.bibtex()


def test_every_paper_is_used():
    known = {paper for paper in vars(papers).values() if isinstance(paper, papers.Paper)}
    assert {paper for method in CARDS.values() for paper in method.papers} == known


@each
def test_every_hyperparameter_is_in_the_table(name):
    method = CARDS[name]
    parts = method.arguments_of or (method.source,)
    arguments = {argument for part in parts for argument in inspect.signature(part).parameters} - {"options"}
    assert set(method.usual) >= arguments - NOT_TUNED - ({"samples", "classes"} if name == "saf" else set())
    assert set(method.usual) <= arguments
    assert set(method.required) <= arguments


@each
def test_a_card_is_complete_and_one_screen(name):
    method, text = CARDS[name], card(name)
    heads = ["Hyperparameters", "Cost and memory", "Measured", "Checked against", "Caveats", "Citation"]
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == heads
    assert all(part in text for part in (method.equation, method.usage, "**When to use it.**", "**When not.**"))
    assert method.summary.count(". ") == 1
    assert "``" not in method.summary
    assert not inspect.getdoc(method.source).startswith(method.label) or not method.summary.startswith(method.label)
    assert method.caveats
    before, _, after = text.partition("## Measured\n")
    assert len((before + after[after.index("## ") :]).splitlines()) <= 60
    assert all(len(line) <= 120 or "|" in line or "http" in line for line in text.splitlines())
    assert all("|" not in usual for usual in [*method.usual.values(), method.when])  # they stand in tables


def test_the_pages_are_what_the_catalogue_and_the_measurements_make():
    for name, text in make_cards.pages().items():
        page = ROOT / "docs" / "methods" / name
        assert page.read_text(encoding="utf-8") == text, "run python scripts/make_cards.py"
    assert {page.name for page in (ROOT / "docs" / "methods").iterdir()} == set(make_cards.pages())


def test_measured_memory_is_that_of_every_method():
    values = json.loads(make_cards.MEASURED.read_text(encoding="utf-8"))
    missing = set(CARDS) - set(values["memory"]["methods"])
    again = f"benchmarks/memory.py {' '.join(missing)} --json FILE, and scripts/make_cards.py --memory FILE"
    assert not missing, f"run {again}"
    assert not make_cards.private(values)


@pytest.mark.parametrize("name", ["sam", "sam_on", "friendly_sam"])
def test_memory_is_counted_again(name):
    assert memory.extra(CARDS[name]).between == pytest.approx(
        cards.measured()["memory"]["methods"][name]["between"], abs=0.02
    )


def run_folder(path: Path, tests: dict[str, list[float]], **fields) -> Path:
    """A run folder as `steppe compare` leaves it, of two measurements a run, with these test accuracies at the end."""
    recipe = Recipe(methods=tuple(tests), epochs=4, seeds=3, out=path, **fields)
    path.mkdir()
    folder = RunFolder(path)
    folder.claim(recipe, 1)
    for run in recipe.runs():
        test = tests[run.method][run.seed]
        records = [Record(e, e, 10, 100, 1.5, 0.1, 99.0, 1.0, test, 99.0 - test, 30.0 * e, 100.0) for e in (2, 4)]
        folder.run(run).mkdir(parents=True)
        (folder.run(run) / METRICS).write_bytes(write_records(records))
    session = {"date": "2026-11-22T10:00:00+00:00", "steppe": "0.1.0", "torch": "2.13.0", "cpu": "A CPU", "threads": 2}
    (path / "environment.json").write_text(json.dumps([session]))
    return path


def test_a_run_becomes_numbers_on_the_cards(tmp_path, monkeypatch):
    tests = {"sgd": [80.0, 81.0, 82.0], "sam": [81.0, 82.1, 83.1], "gsam:rho=0.1": [79.0, 80.1, 81.1]}
    run = run_folder(tmp_path / "run", tests)
    measured, pages = tmp_path / "measured.json", tmp_path / "pages"
    measured.write_text('{"memory": null, "comparisons": []}')
    monkeypatch.setattr(make_cards, "MEASURED", measured)
    monkeypatch.setattr(make_cards, "PAGES", pages)
    assert make_cards.main([str(run)]) == 0
    monkeypatch.setattr(cards, "measured", lambda: json.loads(measured.read_text()))
    (one,) = cards.measured()["comparisons"]
    assert (one["base"], one["sam"], one["standardized_epochs"]) == ("sgd", "sam", 4)
    assert str(tmp_path) not in measured.read_text()
    text = card("gsam")
    assert "| SGD |  | 1.50 | 99.00±0.00 | 81.00±1.00 | 18.00±1.00 | 120 | 3 |" in text
    assert "| GSAM (rho 0.1) | 0.1 | 1.50 | 99.00±0.00 | 80.07±1.05 |" in text
    flat = " ".join(text.split())
    assert "against SGD, 3 paired runs: test accuracy -0.93 points, 95 % interval [-1.08, -0.79]: worse;" in flat
    assert "against SAM, 3 paired runs: test accuracy -2.00 points, 95 % interval [-2.00, -2.00]: worse;" in flat
    assert "not yet measured on fashion-mnist" in card("looksam").lower()
    index = cards.index()
    assert "| GSAM (rho 0.1) | -0.93 [-1.08, -0.79] worse |" in index
    assert "--methods sgd sam gsam:rho=0.1" in index


def test_memory_of_some_methods_is_merged(tmp_path, monkeypatch):
    measured, some = tmp_path / "measured.json", tmp_path / "memory.json"
    numbers = {"within": 1.0, "between": 0.5}
    measured.write_text(json.dumps({"memory": {"methods": {"sam": numbers, "gone": numbers}}, "comparisons": []}))
    some.write_text(json.dumps({"torch": "2.13.0", "methods": {"gsam": numbers}}))
    monkeypatch.setattr(make_cards, "MEASURED", measured)
    monkeypatch.setattr(make_cards, "PAGES", tmp_path / "pages")
    assert make_cards.main(["--memory", str(some)]) == 0
    assert json.loads(measured.read_text())["memory"] == {
        "torch": "2.13.0",
        "methods": {"sam": numbers, "gsam": numbers},
    }


def test_a_folder_that_is_none_is_one_line(tmp_path, capsys):
    assert make_cards.main([str(tmp_path)]) == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_stale_pages_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_cards, "PAGES", tmp_path)
    assert make_cards.main(["--check"]) == 1
    assert "gsam.md is stale" in capsys.readouterr().err


def test_one_run_gives_no_verdict_and_several_specs_stand_side_by_side():
    value = {"n": 1, "mean": 0.5, "sd": None, "half_width_95": None}
    row = {"method": "sgd", "label": "SGD", "rho": None}
    row |= dict.fromkeys(("passes", "train_accuracy", "test_accuracy", "gap", "seconds"), value)
    rows = [row, row | {"method": "gsam", "label": "GSAM"}, row | {"method": "gsam:rho=0.1", "label": "GSAM (rho 0.1)"}]
    differences = [
        {"method": m, "reference": "sgd", "test_accuracy": value, "gap": value} for m in ("gsam", "gsam:rho=0.1")
    ]
    environment = {"date": "2026-11-22", "steppe": "0.1.0", "torch": "2.13.0", "gpu": "A GPU"}
    run = {"rows": rows, "differences": differences, "base": "sgd", "sam": None, "environment": environment}
    run |= {"setting": "a network", "standardized_epochs": 2, "command": "steppe compare"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "measured", lambda: {"memory": None, "comparisons": [run, run]})
        text = card("gsam")
    assert " ".join(text.split()).count("no verdict") == 8
    assert text.count("| GSAM (rho 0.1) |") == 2
    assert "Memory not yet measured." in text
