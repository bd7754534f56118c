from fractions import Fraction
from typing import Any

import pytest
import torch
from tiny import recipe, training_of

import steppe
from steppe.experiments.config.method_spec import MethodSpec


def test_equal_specs_have_one_spelling() -> None:
    methods = ("sam:rho=.10", "late_sam:start=5e-1,rho=1", "looksam")
    assert tuple(map(str, recipe(methods=methods).comparison.methods)) == (
        "sam:rho=0.1",
        "late_sam:rho=1.0,start=0.5",
        "looksam",
    )
    names = [run.name for run in recipe(methods=methods).runs()]
    assert names == ["sam-rho=0.1-seed0", "late_sam-rho=1.0-start=0.5-seed0", "looksam-seed0"]
    labels = [run.method.label for run in recipe(methods=methods).runs()]
    assert labels == ["SAM (rho 0.1)", "Late SAM (rho 1.0, start 0.5)", "LookSAM"]


def test_arguments_of_a_spec_reach_the_optimizer_and_the_plan() -> None:
    assert MethodSpec.parse("sam:rho=0.3").rho(0.05) == 0.3
    assert MethodSpec.parse("asam").rho(0.05) == 0.5
    assert MethodSpec.parse("asam:rho=0.3").rho(0.05) == 0.3
    planned = {
        "sgd": 1,
        "sam": 2,
        "looksam": 1.2,
        "looksam:interval=2": 1.5,
        "late_sam:start=0.9": 1.1,
        "random_sam:p=0.1": 1.1,
    }
    assert {spec: MethodSpec.parse(spec).passes for spec in planned} == {
        k: Fraction(str(v)) for k, v in planned.items()
    }
    look = next(recipe(methods=("looksam:interval=2,alpha=0.3",)).runs())
    optimizer: Any = training_of(look).optimizer
    assert (optimizer.cadence.interval, optimizer.combination.alpha, optimizer.rho) == (2, 0.3, 0.05)
    late = next(recipe(methods=("late_sam:start=0.5,rho=0.2",), extra_epochs=3).runs())
    optimizer = training_of(late).optimizer
    assert (optimizer.cadence.start, optimizer.cadence.total_steps, optimizer.rho) == (0.5, 14, 0.2)  # 4 * 5 / 1.5
    draws: Any = [training_of(run).optimizer for run in recipe(methods=("random_sam",), seeds=2).runs()]
    assert [optimizer.cadence.seed for optimizer in draws] == [0, 1]


def without_annotations(base, rho=0.05, steps=2, kind="a"):  # type: ignore[no-untyped-def]
    return steppe.SAM(base, rho)


def without_optimizer(base: torch.optim.Optimizer) -> None:
    """Return nothing, by mistake."""


def with_required(base: torch.optim.Optimizer, alpha: Any, rho: float = 0.05) -> torch.optim.Optimizer:
    return steppe.SAM(base, rho)


def failing(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    raise RuntimeError("no luck")


def test_arguments_without_annotations_have_the_types_of_their_defaults() -> None:
    spec = MethodSpec.parse(f"{__name__}:without_annotations:kind=b,rho=0.1,steps=3")
    assert dict(spec.overrides) == {"rho": 0.1, "kind": "b", "steps": 3}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without_optimizer", "it returned NoneType, and an optimizer around the base is needed"),
        ("with_required", "it raised TypeError: with_required.. missing 1 required positional argument: 'alpha'"),
        ("failing", "it raised RuntimeError: no luck, at .*test_method_spec.py:.*: raise RuntimeError"),
    ],
)
def test_error_in_a_function_of_the_user_is_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"methods: {__name__}:{name}: {message}"):
        recipe(methods=("sgd", f"{__name__}:{name}"))
