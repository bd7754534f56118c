"""benchmarks/evidence: searches and comparisons by one command, and the pages that show them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from tiny import command_line

import make_evidence
import results
from evidence import run
from evidence.measured import Measured
from evidence.recipes import EVIDENCE, Evidence
from evidence.table import render, render_search
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe

RHO = "rho=0.05,0.1,0.2"
TINY = ["--width", "2", "--device", "cpu", "--no-amp"]


def test_every_experiment_is_a_recipe_with_a_page() -> None:
    for name, evidence in EVIDENCE.items():
        recipe, _ = RECIPES[evidence.recipe or name]
        assert str(recipe.comparison.methods[0]) == evidence.base
        assert recipe.comparison.seeds == 10
        assert (make_evidence.PAGES / f"{name}.md").exists()
        assert f"({name}.md)" in (make_evidence.PAGES / "README.md").read_text("utf-8")


def test_pages_show_the_results() -> None:
    for name in EVIDENCE:
        text = (make_evidence.PAGES / f"{name}.md").read_text("utf-8")
        assert make_evidence.page(name, text) == text, "run python scripts/make_evidence.py"


def test_recipes_have_the_radii_that_were_chosen() -> None:
    for name in RECIPES.keys() & EVIDENCE.keys():
        if measured := Measured.load(name):
            chosen = [found["chosen"] for found in measured.settings.values()]
            methods = [str(method) for method in RECIPES[name][0].comparison.methods]
            assert any(set(specs) <= set(methods) for specs in chosen), name


def summary(difference: float) -> dict[str, object]:
    estimate = {"n": 3, "mean": 80.0, "sd": 1.0}
    compared = {"mean": difference, "half_width_95": 1.0, "interval_95": [difference - 1, difference + 1]}
    verdict = {
        "method": "sam:rho=0.1",
        "base": "sgd",
        "metric": {"name": "accuracy", "higher_is_better": True, "unit": "%"},
        "comparisons": [
            {"control": "equal_compute", "difference": compared, "verdict": "better" if difference > 1 else "worse"},
            {"control": "averaged_weights", "difference": compared | {"interval_95": None}, "verdict": ""},
        ],
    }
    rows = [
        {"method": method, "test_accuracy": estimate, "train_accuracy": estimate, "passes": estimate}
        for method in ("sgd", "sam:rho=0.1")
    ]
    rows[0]["test_accuracy (ema)"] = estimate | {"mean": 81.5}
    return {"rows": rows, "verdicts": [verdict]}


def result(device: str = "a machine", *, date: str = "2026-11-29", **settings: float) -> results.Result:
    trials = [
        {"method": "sam", "values": {"rho": 0.2}, "found": [70.0, 71.0]},
        {"method": "sam", "values": {"rho": 0.1}, "found": [75.0, 76.0]},
    ]
    found = {
        name: {
            **{"date": date, "search": "steppe tune x", "command": "steppe compare x", "trials": trials},
            "summary": summary(value),
        }
        for name, value in settings.items()
    }
    return results.Result("evidence_made_up", device, False, "2026-12-31", "c", "2.13", {}, {"settings": found})


def searched_so_far(**of_methods: dict[float, float]) -> dict[str, Any]:
    """Return what searches have found: for each method, the value at each radius."""
    best = {method: max((value, rho) for rho, value in found.items()) for method, found in of_methods.items()}
    return {
        "search": "steppe tune x",
        "trials": [
            {"method": method, "values": {"rho": rho}, "found": [value]}
            for method, found in of_methods.items()
            for rho, value in found.items()
        ],
        "best": {method: [value, f"{method}:rho={rho}"] for method, (value, rho) in best.items()},
    }


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """A recipe with three settings, of which no table shows two side by side."""
    settings = {name: ["--lr", str(rate)] for name, rate in {"low": 0.1, "high": 0.2, "other": 0.3}.items()}
    made_up = Evidence(["sam"], settings=settings, measures=["accuracy"])
    monkeypatch.setitem(EVIDENCE, "made-up", made_up)
    return made_up


@pytest.mark.usefixtures("evidence")
def test_tables_have_means_controls_and_the_search() -> None:
    measured = Measured("made-up", [result(low=5.0, high=-3.0)])
    assert "- low, SAM: 0.1: 75.50, 0.2: 70.50" in render_search(measured)
    text = render(measured)
    assert "| low | SGD | 80.00±1.00 | 80.00±1.00 | 80.00 | 3 |" in text
    assert "|  | SGD, averaged weights | 81.50±1.00 |" in text
    assert "| low | SAM (rho 0.1) | accuracy | **+5.00 [+4.00, +6.00]** | – | – | +5.00 |" in text
    assert "| high | SAM (rho 0.1) | accuracy | *-3.00 [-4.00, -2.00]* | – | – | -3.00 |" in text
    assert text.endswith("\na machine, torch 2.13, 2026-11-29; `c`")


@pytest.mark.usefixtures("evidence")
def test_settings_of_several_machines_and_days_are_one_table_in_the_recipes_order() -> None:
    found = [result(high=-3.0, date="2026-11-30"), result("another", low=5.0), result("a third", date="2026-11-30")]
    text = render(Measured("made-up", found))
    assert text.index("| low | SAM") < text.index("| high | SAM")
    assert text.endswith(
        "\n- low: another, torch 2.13, 2026-11-29; `c`\n- high: a machine, torch 2.13, 2026-11-30; `c`"
    )


def test_one_setting_needs_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVIDENCE, "made-up", Evidence(["sam"]))
    text = render(Measured("made-up", [result(**{"": 5.0})]))
    assert "| SAM (rho 0.1) | accuracy | **+5.00 [+4.00, +6.00]** |" in text


def test_settings_of_many_methods_are_shown_side_by_side(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVIDENCE, "made-up", replace(evidence, side_by_side=["low", "high"]))
    text = render(Measured("made-up", [result(low=5.0, high=-3.0, other=2.0)]))
    assert "| SAM | 80.00 | 0.1 | 80.0 (**+5.0**) | 0.1 | 80.0 (*-3.0*) |" in text
    assert "| SGD | 80.00 |  | 80.0 |  | 80.0 |" in text
    assert "| SAM (rho 0.1) | accuracy | **+2.00 [+1.00, +3.00]** |" in text
    assert "| low |" not in text


def settings_found(name: str, evidence: Evidence, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run an experiment in tiny size, and return what it has saved for each setting."""
    monkeypatch.setattr(run, "EVIDENCE", {name: evidence})
    monkeypatch.setattr(run, "_steppe", lambda words: command_line(list(words), draws=False))
    monkeypatch.chdir(path)
    words = ["run.py", name, "--tiny", "--runs-at-once", "1", "--results", str(path), "--machine", "m"]
    monkeypatch.setattr("sys.argv", words)
    run.main()
    (file,) = path.glob(f"*/evidence_{name}.json")
    return json.loads(file.read_text())["data"]["settings"]


@pytest.mark.slow
def test_the_radius_is_chosen_on_held_out_data_and_confirmed_by_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    evidence = Evidence(["sam"], settings={"tiny": TINY}, radii=(0.05, 0.1), wider=1)
    found = settings_found("corruptions", evidence, tmp_path, monkeypatch)["tiny"]
    assert len(found["trials"]) > 2  # one of two radii is at an end
    best = max(found["trials"], key=lambda trial: sum(trial["found"]))
    assert found["chosen"] == [f"sam:rho={best['values']['rho']}"]
    assert [row["method"] for row in found["summary"]["rows"]] == ["sgd", *found["chosen"]]
    seeds = {
        name: sorted({int(path.name.partition("seed")[2]) for path in tmp_path.glob(f"runs/evidence/{name}/runs/*")})
        for name in ("corruptions-tiny",)
    }
    assert seeds == {"corruptions-tiny": [0, 1]}
    assert {path.name.partition("seed")[2] for path in tmp_path.glob("runs/evidence/*-tune-*/trials/*/runs/*")} == {
        "100",
        "101",
    }


@pytest.mark.slow
def test_the_best_of_a_group_is_confirmed_and_a_setting_may_take_the_search_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    evidence = Evidence(
        [("sam", "asam"), "late_sam:start=0.5"],
        ["sgd+ema"],
        recipe="annealed",
        radii=(0.05, 0.1),
        settings={"first": TINY, "other batches": [*TINY, "--batch-size", "32"]},
        chosen_in={"other batches": "first"},
        tuned_there=["asam"],
        seeds=1,
    )
    assert evidence.searches("first", run.NOTHING) == {
        "rho=0.05,0.1": ["sam", "late_sam:start=0.5"],
        "rho=0.5,1": ["asam"],
    }
    settings = settings_found("price", evidence, tmp_path, monkeypatch)
    found = {
        method: max(
            (mean(trial["found"]), trial["values"]["rho"])
            for trial in settings["first"]["trials"]
            if trial["method"] == method
        )
        for method in ("sam", "asam", "late_sam:start=0.5")
    }
    best = "sam" if found["sam"][0] >= found["asam"][0] else "asam"
    assert settings["first"]["chosen"][0].partition(":")[0] == best
    assert [spec.partition(":")[0] for spec in settings["other batches"]["chosen"]] == ["asam"]
    assert "--batch-size 32" in settings["other batches"]["command"]
    assert settings["other batches"]["search"] is None
    monkeypatch.setitem(EVIDENCE, "price", evidence)
    found_by = results.Result("evidence_price", "m", False, "2026-11-29", "c", "2.13", {}, {"settings": settings})
    text = render_search(Measured("price", [found_by]))
    assert text.count("steppe tune") == 2


@pytest.mark.usefixtures("evidence")
def test_what_is_saved_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting is saved on another machine; of another, only the search, before the comparison was stopped."""
    searched, compared = list[str](), list[str]()

    def search(folder: Path, setting: str, *_: object) -> dict[str, Any]:
        searched.append(setting)
        return searched_so_far(sam={0.05: 60.0, 0.1: 70.0, 0.2: 65.0})

    def compare(words: Sequence[str]) -> None:
        compared.append(words[-1])
        if len(compared) == 1:
            raise KeyboardInterrupt
        Path(words[-1]).mkdir(parents=True)
        (Path(words[-1]) / "summary.json").write_text("{}", "utf-8")

    other = tmp_path / "another" / "evidence_made_up.json"
    other.parent.mkdir()
    fields = {**asdict(result("another", low=5.0)), "tiny": False}
    del fields["name"]
    other.write_text(json.dumps(fields), "utf-8")
    monkeypatch.setattr(run, "search", search)
    monkeypatch.setattr(run, "_steppe", compare)
    monkeypatch.setattr(run, "_curves", lambda folder: {})
    words = ["--results", str(tmp_path), "--machine", "m", "--out", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["run.py", "made-up", *words])
    with pytest.raises(KeyboardInterrupt):
        run.main()
    run.main()
    run.main()
    assert searched == ["high", "other"]
    assert [Path(folder).name for folder in compared] == ["made-up-high", "made-up-high", "made-up-other"]
    data = json.loads((tmp_path / "m" / "evidence_made_up.json").read_text("utf-8"))["data"]
    assert list(data["settings"]) == ["high", "other"]
    assert data["searches"] == {}
    assert list(Measured.load("made-up", tmp_path).settings) == ["low", "high", "other"]


def test_a_setting_may_search_other_methods() -> None:
    evidence = Evidence(["sam", ("asam", "looksam")], tuned_in={"few": ["late_sam"]}, chosen_in={"more": "few"})
    assert evidence.searches("few", run.NOTHING) == {RHO: ["late_sam"]}
    assert evidence.searches("all", run.NOTHING) == {RHO: ["sam", "looksam"], "rho=0.5,1,2": ["asam"]}
    found = {"sam": (1.0, "sam:rho=1"), "asam": (3.0, "asam:rho=2"), "looksam": (2.0, "looksam:rho=3")}
    assert evidence.best("few", {"late_sam": (1.0, "late_sam:rho=4")}) == ["late_sam:rho=4"]
    assert evidence.best("all", found) == ["sam:rho=1", "asam:rho=2"]
    assert evidence.best("more", found) == []  # tuned_there


def test_a_search_goes_on_where_the_best_radius_is_the_smallest_or_the_largest() -> None:
    evidence = Evidence(["sam", "looksam", "asam"], wider=2)
    sam, looksam = {0.05: 1.0, 0.1: 2.0, 0.2: 3.0}, {0.05: 2.0, 0.1: 1.0, 0.2: 1.0}
    found = searched_so_far(sam=sam, looksam=looksam, asam={0.5: 1.0, 1.0: 3.0, 2.0: 2.0})
    assert evidence.searches("", found) == {"rho=0.4,0.8": ["sam"], "rho=0.0125,0.025": ["looksam"]}
    assert replace(evidence, wider=0).searches("", found) == {}
    found = searched_so_far(sam={**sam, 0.4: 4.0, 0.8: 5.0}, looksam={**looksam, 0.025: 3.0, 0.0125: 1.0})
    assert evidence.searches("", found) == {"rho=1.6,3.2": ["sam"], "rho=0.5,1,2": ["asam"]}
    found = searched_so_far(sam={**sam, 3.2: 6.0}, looksam={**looksam, 0.003125: 4.0}, asam={1.0: 2.0})
    assert evidence.searches("", found) == {"rho=2,4": ["asam"]}
    assert replace(evidence, wider=1).searches(
        "", searched_so_far(sam={**sam, 0.8: 5.0}, looksam={**looksam, 0.0125: 3.0})
    ) == {"rho=0.5,1,2": ["asam"]}


def test_the_weight_of_a_method_without_a_radius_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = Evidence(["saf", "mesa", "sam"], wider=1)
    words = {"lmbda=0.15,0.3,0.6": ["saf"], "lmbda=0.4,0.8,1.6": ["mesa"], RHO: ["sam"]}
    assert evidence.searches("", run.NOTHING) == words
    trials = [{"method": "saf", "values": {"lmbda": value}, "found": [80.0 + value]} for value in (0.3, 0.15, 0.6)]
    best = {"saf": [80.6, "saf:lmbda=0.6"]}
    assert evidence.searches("", {"trials": trials, "best": best})["lmbda=1.2,2.4"] == ["saf"]
    monkeypatch.setitem(EVIDENCE, "made-up", Evidence(["saf"]))
    found = result(**{"": 5.0})
    found.data["settings"][""]["trials"] = trials
    assert "- SAF: lmbda 0.15: 80.15, lmbda 0.3: 80.30, lmbda 0.6: 80.60" in render_search(Measured("made-up", [found]))


def test_settings_that_are_trained_alike_share_their_runs() -> None:
    wrong = ["--label-noise", "0.4"]
    evidence = Evidence(
        ["sam"],
        settings={"right": (), "40 % wrong, few": wrong, "40 % wrong, many": wrong, "more": ["--shots", "9"]},
        chosen_in={"40 % wrong, many": "40 % wrong, few", "more": "right"},
        confirmed_by=3,
        confirmed_there_by=10,
    )
    folders = [evidence.folder("family", setting) for setting in evidence.settings]
    assert folders == ["family-right", "family-40-wrong-few", "family-40-wrong-few", "family-more"]
    assert [evidence.confirming_runs(setting) for setting in evidence.settings] == [3, 3, 10, 10]
    assert EVIDENCE["price"].confirming_runs("12,000 images") == 20
    assert EVIDENCE["noisy-labels"].confirming_runs("40 % wrong") is None


def test_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "noisy"])
    with pytest.raises(SystemExit):
        run.main()
    assert "'noisy' is not one of noisy-labels" in capsys.readouterr().err


def test_searches_do_not_use_the_seeds_of_the_comparison() -> None:
    assert max(recipe.comparison.seeds for recipe, _ in RECIPES.values()) <= run.FIRST_SEARCH_SEED
    assert Recipe().comparison.first_seed == 0
