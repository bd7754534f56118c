from pathlib import Path

import pytest
import torch
from own_tasks import ON_ANY_MODEL
from tiny import recipe, train_run, training_of, untimed

from steppe import variants
from steppe.experiments.config import methods
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import METHODS, Method
from steppe.experiments.config.recipe import Run


def test_every_variant_is_a_method_of_comparisons_and_can_be_built() -> None:
    assert variants.__all__
    assert set(variants.__all__) <= set(METHODS), "give its card a comparison"
    for name in ON_ANY_MODEL:
        method = METHODS[name]
        base = method.plain or "sgd"
        (run,) = recipe(methods=(name,), base=base).runs()
        assert isinstance(training_of(run).optimizer, torch.optim.Optimizer)
        assert 1 <= run.method.passes <= 6
        assert "_" not in run.method.label


@pytest.mark.slow
def test_eigen_sam_updates_its_eigenvector_and_counts_the_cost(tmp_path: Path) -> None:
    (run,) = recipe(methods=("eigen_sam:interval=2,iterations=3",), epochs=40).runs()
    assert run.method.passes == 2 + 7 / 2
    records = train_run(run, tmp_path)
    assert records[-1].passes == pytest.approx(5.5, abs=1.0)
    assert records[-1].steps == pytest.approx(records[-1].epoch * training_of(run).batches, abs=1)


@pytest.mark.slow
def test_sassha_counts_the_cost_of_its_estimates(tmp_path: Path) -> None:
    (run,) = recipe(methods=("sassha:interval=2,lr=0.05",), epochs=40).runs()
    assert run.method.passes == 2 + 3 / 2
    records = train_run(run, tmp_path)
    assert records[-1].passes == pytest.approx(3.5, abs=0.5)
    assert records[-1].steps == pytest.approx(records[-1].epoch * training_of(run).batches, abs=1)


def test_an_entry_of_the_registry_suffices_for_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Method("a method of my own", METHODS["sam"].build, rho_factor=2.0, label="Mine")
    monkeypatch.setattr(methods, "METHODS", {**METHODS, "mine": mine})
    double, plain = recipe(methods=("mine",)), recipe(methods=("sam",), rho=0.1)
    ours, theirs = (
        train_run(Run(double, MethodSpec.parse("mine"), 0), tmp_path / "a"),
        train_run(Run(plain, MethodSpec.parse("sam"), 0), tmp_path / "b"),
    )
    assert untimed(ours) == untimed(theirs)
