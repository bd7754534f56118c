from pathlib import Path
from typing import Any

import pytest
from fine_tuning import recipe

from steppe.experiments.analysis.summary import setting
from steppe.experiments.commands import parse
from steppe.experiments.config.presets import RECIPES


@pytest.mark.parametrize(
    ("fields", "meaning"),
    [
        ({"backbone": "owm"}, r"backbone: 'owm' is unknown; did you mean 'own'"),
        ({"backbone": "hf:"}, r"backbone: 'hf:' is unknown"),
        ({"dataset": "sample"}, r"dataset=sample: the own backbone .* nothing would be transferred"),
        ({"backbone": "none", "freeze": True}, r"freeze=True: without a backbone all layers are new"),
        ({"backbone": "none", "head_lr": 0.1}, r"head_lr=0.1: without a backbone"),
        ({"head_lr": 0.0}, r"head_lr=0.0: .* above 0"),
        ({"image_size": 32}, r"image_size=32: images are resized for timm and hf"),
        ({"shots": 0}, r"shots=0: training images of each class"),
        ({"backbone": "none", "data_dir": Path("d")}, r"data_dir=d: nothing here is read from the full Fashion-MNIST"),
    ],
)
def test_an_invalid_value_is_reported_with_its_meaning(fields: dict[str, Any], meaning: str) -> None:
    with pytest.raises(ValueError, match=meaning):
        recipe(**fields)


def test_steppe_finetune_is_the_recipe_finetune() -> None:
    short, long = parse(["finetune", "--shots", "5"]), parse(["compare", "finetune", "--shots", "5"])
    assert short.recipe == long.recipe == RECIPES["finetune"][0].replace(shots=5)  # type: ignore[union-attr]
    assert parse(["tune", "finetune"]).recipe == RECIPES["finetune"][0]  # type: ignore[union-attr]


def test_title_names_the_backbone() -> None:
    assert setting(recipe(shots=1, freeze=True, head_lr=0.1, pretrain_on="fashion-mnist", pretrain_epochs=3)) == (
        "PreAct ResNet-18 (width 2, pretrained on Fashion-MNIST, 3 epochs, linear probe) on digits, 1 image a class: "
        "SGD, lr 0.02 (head 0.1), momentum 0.9, batch 16, rho 0.05"
    )
    assert setting(recipe(backbone="hf:a/b", image_size=64)).startswith("hf:a/b (pretrained, 64 px) on digits: SGD")
