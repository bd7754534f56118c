import json
import math

import pytest
from tiny import recipe

from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe


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
        ("first_seed", 10**23, "the first run's seed, must be at most"),
        ("methods", ("sam:rho=-1",), "methods: sam:rho=-1.0: rho"),
        ("methods", ("looksam:interval=0",), "methods: looksam:interval=0: interval must be 1 or more"),
        ("methods", ("late_sam:start=2",), "start must be between 0 and 1"),
        ("methods", ("adamw", "sam"), "mix two effects"),
    ],
)
def test_an_invalid_value_is_reported_with_its_meaning(field: str, value: object, meaning: str) -> None:
    with pytest.raises(ValueError, match=meaning) as error:
        recipe(**{field: value})
    assert str(error.value).startswith(field)


def test_momentum_with_adamw_raises() -> None:
    with pytest.raises(ValueError, match=r"momentum=0\.9: adamw has none"):
        recipe(base="adamw", methods=("adamw", "sam"), momentum=0.9)


def test_a_method_that_needs_momentum_gives_it_to_all_methods() -> None:
    assert recipe().base_momentum == 0.0
    assert recipe(methods=("sgd", "msam")).base_momentum == 0.9
    assert recipe(methods=("sgd", "msam"), momentum=0.5).base_momentum == 0.5
    assert recipe(methods=("adamw", "msam"), base="adamw").base_momentum == 0.0
    assert recipe(methods=("sgd", "msam")).result_options() != recipe(methods=("sgd", "sam")).result_options()
    with pytest.raises(ValueError, match=r"momentum=0: msam perturbs along .* Use --momentum 0\.9"):
        recipe(methods=("sgd", "msam"), momentum=0)


def test_runs_are_paired_by_seed_and_only_two_pass_methods_get_extra_epochs() -> None:
    runs = list(recipe(seeds=2, first_seed=3, epochs=4, extra_epochs=1, methods=("sgd", "looksam")).runs())
    assert [run.name for run in runs] == ["sgd-seed3", "looksam-seed3", "sgd-seed4", "looksam-seed4"]
    assert [run.standardized_epochs for run in runs[:2]] == [4, 5]


def test_all_methods_are_measured_at_the_same_standardized_epochs() -> None:
    sgd, sam = recipe(epochs=8, extra_epochs=2, eval_every=4).runs()
    assert (sgd.grid, sam.grid) == ([4, 8], [4, 8, 10])
    sgd, sam = recipe(epochs=8, eval_every=3).runs()
    assert (sgd.grid, sam.grid) == ([3, 4, 6, 8], [3, 6, 8])  # at 4, SGD has made as many steps as SAM will: a control


def test_json_round_trip() -> None:
    for given, _ in RECIPES.values():
        given = given.replace(out=given.folder, methods=(given.comparison.methods[0], "asam:rho=0.5"))
        assert Recipe.from_json(json.loads(json.dumps(given.to_json()))) == given
    with pytest.raises(ValueError, match="learning_rate"):
        Recipe.from_json({"learning_rate": 1})


def test_folder_without_an_option_that_was_added_later_is_read_and_continued() -> None:
    now = recipe(then="rotated")
    older = json.loads(json.dumps(now.to_json()))
    del older["forgetting"]["then_lr"], older["output"]["log"]
    older["output"]["tensorboard"] = True  # what --log tensorboard was called
    assert Recipe.from_json(older) == now
    assert "then_lr" not in now.result_options()
    assert recipe(then="rotated", then_lr=0.1).result_options()["then_lr"] == 0.1


def test_schedule_of_a_task_is_no_reason_against_further_compute_before_it_is_known() -> None:
    of_task = {"task": "user_tasks:regression", "base": "own", "lr": None, "weight_decay": None, "batch_size": None}
    given = Recipe().replace(schedule="own", extra_epochs=2, **of_task)
    assert given.replace(schedule="constant").comparison.extra_epochs == 2
    with pytest.raises(ValueError, match="extra_epochs=2 with schedule=cosine"):
        given.replace(schedule="cosine")


def test_result_contains_the_options_that_change_a_run_and_no_others() -> None:
    same = recipe(seeds=5, methods=("sam",), log="tensorboard", name="other", first_seed=1, checkpoint_seconds=1.0)
    assert same.result_options() == recipe().result_options()
    differing = {"lr": 0.1, "threads": 2, "epochs": 6, "amp": True, "norm": "group", "cuda_graphs": True}
    for field, value in differing.items():
        assert recipe(**{field: value}).result_options() != recipe().result_options()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"width": 24}, "width=24"),
        ({"width": 32, "norm": "group"}, "norm=group"),
        ({"width": 32, "stem_stride": 1}, "stem_stride=1"),
        ({"width": 16, "widths": (16, 20)}, "width=20"),
        ({"width": 16, "backbone": "own", "dataset": "digits"}, "backbone=own"),
    ],
)
def test_options_of_the_resnet_are_refused_with_a_vision_transformer(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} with network=vit"):
        Recipe().replace(network="vit", **options)
