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
    without = {"eigen_sam"}  # a comparison has no place for the updates of its eigenvector
    assert set(variants.__all__) - without <= set(METHODS), "give its card a comparison"
    for name in ON_ANY_MODEL:
        method = METHODS[name]
        base = method.plain or "sgd"
        (run,) = recipe(methods=(name,), base=base).runs()
        assert isinstance(training_of(run).optimizer, torch.optim.Optimizer)
        assert 1 <= run.method.passes <= 6
        assert "_" not in run.method.label


def test_an_entry_of_the_registry_suffices_for_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Method("a method of my own", METHODS["sam"].build, rho_factor=2.0, label="Mine")
    monkeypatch.setattr(methods, "METHODS", {**METHODS, "mine": mine})
    double, plain = recipe(methods=("mine",)), recipe(methods=("sam",), rho=0.1)
    ours, theirs = (
        train_run(Run(double, MethodSpec.parse("mine"), 0), tmp_path / "a"),
        train_run(Run(plain, MethodSpec.parse("sam"), 0), tmp_path / "b"),
    )
    assert untimed(ours) == untimed(theirs)
