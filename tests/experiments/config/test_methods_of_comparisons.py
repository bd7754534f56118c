import inspect
from pathlib import Path

import pytest
import torch
from tiny import CPU, dataset, recipe, train_run, untimed

from steppe import variants
from steppe.experiments.config import methods
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import METHODS, Method
from steppe.experiments.config.recipe import Run
from steppe.experiments.training.run import Training


def test_every_variant_is_a_contender_and_can_be_built() -> None:
    public = {n for n, f in vars(variants).items() if inspect.isfunction(f) and f.__module__ == variants.__name__}
    public = {name for name in public if not name.startswith("_")}
    assert public <= set(METHODS), "add an entry to steppe.experiments.config.methods.METHODS"
    for name, method in METHODS.items():
        base = method.plain or "sgd"
        (run,) = recipe(methods=(name,), base=base).runs()
        run = Training(run, dataset(), CPU)
        assert isinstance(run.optimizer, torch.optim.Optimizer)
        assert 1 <= run.method.passes <= 6
        assert "_" not in run.method.label


def test_registry_is_all_there_is_to_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Method("Mine", "a method of my own", METHODS["sam"].build, rho_factor=2.0)
    monkeypatch.setattr(methods, "METHODS", {**METHODS, "mine": mine})
    double, plain = recipe(methods=("mine",)), recipe(methods=("sam",), rho=0.1)
    ours, theirs = (
        train_run(Run(double, MethodSpec.parse("mine"), 0), tmp_path / "a"),
        train_run(Run(plain, MethodSpec.parse("sam"), 0), tmp_path / "b"),
    )
    assert untimed(ours) == untimed(theirs)
