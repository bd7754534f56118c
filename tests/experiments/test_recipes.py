import inspect
import json
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from tiny import CPU, dataset, recipe

from steppe import variants
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.resolve import resolve
from steppe.experiments.training.run import Training


def test_article_is_the_article() -> None:
    article, help_text = RECIPES["article"]
    wanted = {
        "dataset": "fashion-mnist", "methods": ("sgd", "sam"), "base": "sgd", "lr": 0.05, "momentum": 0.0,
        "weight_decay": 0.0, "rho": 0.05, "batch_size": 128, "epochs": 150, "extra_epochs": 50, "width": 64,
        "stem_stride": 1, "norm": "batch",
    }  # fmt: skip
    assert {k: article.options()[k] for k in wanted} | {"methods": tuple(map(str, article.comparison.methods))} == wanted
    assert "does not give the batch size" in help_text
    assert [run.steps(60_000) for run in article.runs()][:2] == [150 * 469, 75 * 469]
    assert [run.standardized_epochs for run in article.runs()][:2] == [150, 200]


def test_demo_needs_no_download() -> None:
    assert RECIPES["demo"][0].data.dataset == "sample"


@pytest.mark.parametrize(
    ("field", "value", "meaning"),
    [
        ("lr", 0.0, "learning rate"),
        ("lr", math.nan, "learning rate"),
        ("rho", -0.1, "neighborhood"),
        ("rho", math.inf, "neighborhood"),
        ("batch_size", 0, "optimizer step"),
        ("seeds", 0, "runs of each method"),
        ("threads", 0, "CPU threads"),
        ("name", "a/b", "names a folder"),
        ("name", "", "names a folder"),
        ("methods", (), "at least one method"),
        ("methods", ("sgd", "sgd"), "each of them once"),
        ("methods", ("sgd", "samm"), "did you mean 'sam'"),
        ("methods", ("sam:rho=0.1", "sam:rho=.10"), "each of them once"),
        ("methods", ("sam:rho",), "'rho' is not an argument: write NAME or NAME:KEY=VALUE"),
        ("methods", ("sam:",), "'' is not an argument"),
        ("methods", ("sam:row=0.1",), "arguments of sam: 'row' is unknown; did you mean 'rho'"),
        ("methods", ("sgd:rho=0.1",), "'rho' is unknown. Known: none"),
        ("methods", ("late_sam:total_steps=9",), "'total_steps' is unknown. Known: rho, start"),
        ("methods", ("looksam:interval=2.5",), "interval='2.5', which must be a whole number"),
        ("methods", ("looksam:interval=2,interval=3",), "interval is given twice"),
        ("methods", ("sam:rho=nan",), "rho='nan', which must be a finite number"),
        ("methods", ("sam:rho=-1",), "methods: sam:rho=-1.0: rho"),
        ("methods", ("looksam:interval=0",), "methods: looksam:interval=0: interval must be 1 or more"),
        ("methods", ("late_sam:start=2",), "start must be between 0 and 1"),
        ("methods", ("adamw", "sam"), "mix two effects"),
    ],
)
def test_a_wrong_value_is_named_with_its_meaning(field: str, value: object, meaning: str) -> None:
    with pytest.raises(ValueError, match=meaning) as error:
        recipe(**{field: value})
    assert str(error.value).startswith(field)


def test_a_base_without_momentum_takes_none() -> None:
    with pytest.raises(ValueError, match=r"momentum=0\.9: adamw has none"):
        recipe(base="adamw", methods=("adamw", "sam"), momentum=0.9)


def test_a_climb_along_the_momentum_gets_one_and_so_does_everybody() -> None:
    assert recipe().base_momentum == 0.0
    assert recipe(methods=("sgd", "msam")).base_momentum == 0.9
    assert recipe(methods=("sgd", "msam"), momentum=0.5).base_momentum == 0.5
    assert recipe(methods=("adamw", "msam"), base="adamw").base_momentum == 0.0
    assert recipe(methods=("sgd", "msam")).result() != recipe(methods=("sgd", "sam")).result()
    with pytest.raises(ValueError, match=r"momentum=0: msam perturbs along .* Say --momentum 0\.9"):
        recipe(methods=("sgd", "msam"), momentum=0)


def test_a_spec_has_one_way_to_be_written() -> None:
    methods = ("sam:rho=.10", "late_sam:start=5e-1,rho=1", "looksam")
    assert tuple(map(str, recipe(methods=methods).comparison.methods)) == ("sam:rho=0.1", "late_sam:rho=1.0,start=0.5", "looksam")
    names = [run.name for run in recipe(methods=methods).runs()]
    assert names == ["sam-rho=0.1-seed0", "late_sam-rho=1.0-start=0.5-seed0", "looksam-seed0"]
    labels = [run.method.label for run in recipe(methods=methods).runs()]
    assert labels == ["SAM (rho 0.1)", "Late SAM (rho 1.0, start 0.5)", "LookSAM"]


def test_an_argument_reaches_the_method_and_the_plan() -> None:
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
    assert {spec: MethodSpec.parse(spec).passes for spec in planned} == {k: Fraction(str(v)) for k, v in planned.items()}
    look = next(recipe(methods=("looksam:interval=2,alpha=0.3",)).runs())
    optimizer: Any = Training(look, dataset(), CPU).optimizer
    assert (optimizer.cadence.interval, optimizer.combination.alpha, optimizer.rho) == (2, 0.3, 0.05)
    late = next(recipe(methods=("late_sam:start=0.5,rho=0.2",), extra_epochs=3).runs())
    optimizer = Training(late, dataset(), CPU).optimizer
    assert (optimizer.cadence.start, optimizer.cadence.total_steps, optimizer.rho) == (0.5, 14, 0.2)  # 4 * 5 / 1.5
    draws: Any = [Training(run, dataset(), CPU).optimizer for run in recipe(methods=("random_sam",), seeds=2).runs()]
    assert [optimizer.cadence.seed for optimizer in draws] == [0, 1]


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


def test_units_are_paired_and_who_pays_for_climbing_gets_further_epochs() -> None:
    runs = list(recipe(seeds=2, first_seed=3, epochs=4, extra_epochs=1, methods=("sgd", "looksam")).runs())
    assert [run.name for run in runs] == ["sgd-seed3", "looksam-seed3", "sgd-seed4", "looksam-seed4"]
    assert [run.standardized_epochs for run in runs[:2]] == [4, 5]


def test_measurements_fall_on_the_same_standardized_epochs() -> None:
    sgd, sam = recipe(epochs=8, extra_epochs=2, eval_every=4).runs()
    assert (sgd.grid, sam.grid) == ([4, 8], [4, 8, 10])
    sgd, sam = recipe(epochs=8, eval_every=3).runs()
    assert sgd.grid == sam.grid == [3, 6, 8]


def test_json_is_a_round_trip() -> None:
    for given, _ in RECIPES.values():
        given = given.replace(out=given.folder, methods=("sgd", "asam:rho=0.5"))
        assert Recipe.from_json(json.loads(json.dumps(given.to_json()))) == given
    with pytest.raises(ValueError, match="learning_rate"):
        Recipe.from_json({"learning_rate": 1})


def test_what_a_result_depends_on() -> None:
    same = recipe(seeds=5, methods=("sam",), tensorboard=True, name="other", first_seed=1, checkpoint_seconds=1.0)
    assert same.result() == recipe().result()
    differing = {"lr": 0.1, "threads": 2, "epochs": 6, "amp": True, "norm": "group", "cuda_graphs": True}
    for field, value in differing.items():
        assert recipe(**{field: value}).result() != recipe().result()


def test_what_is_left_open_is_what_is_faster_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    given = Recipe().replace(device="cpu")
    assert (given.hardware.amp, given.hardware.cuda_graphs, given.hardware.threads) == (None, None, None)
    found = resolve(given)
    assert (found.hardware.amp, found.hardware.cuda_graphs, found.hardware.threads) == (True, False, 1)
    assert resolve(found) == found
    assert resolve(given.replace(amp=False)).hardware.amp is False
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert resolve(given).hardware.amp is False
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported")  # a torch that does not say
    assert resolve(given).hardware.amp is False


@pytest.mark.parametrize("has", [True, False])
def test_what_is_left_open_on_a_gpu(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *, including_emulation: has and not including_emulation)
    found = resolve(Recipe())
    assert (found.hardware.device, found.hardware.amp, found.hardware.cuda_graphs, found.hardware.threads) == ("cuda", has, True, None)
