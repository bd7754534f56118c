from tiny import recipe

from steppe.experiments.commands import Compare, parse
from steppe.experiments.config.presets import RECIPES, command_line


def test_article_recipe_has_the_articles_settings() -> None:
    article, help_text = RECIPES["article"]
    wanted = {
        "dataset": "fashion-mnist", "methods": ("sgd", "sam"), "base": "sgd", "lr": 0.05, "momentum": 0.0,
        "weight_decay": 0.0, "rho": 0.05, "batch_size": 128, "epochs": 150, "extra_epochs": 50, "width": 64,
        "stem_stride": 1, "norm": "batch",
    }  # fmt: skip
    assert {k: article.options()[k] for k in wanted} | {
        "methods": tuple(map(str, article.comparison.methods))
    } == wanted
    assert "does not give the batch size" in help_text
    assert [run.steps(469) for run in article.runs()][:2] == [150 * 469, 75 * 469]
    assert [run.standardized_epochs for run in article.runs()][:2] == [150, 200]


def test_demo_needs_no_download() -> None:
    assert RECIPES["demo"][0].data.dataset == "sample"


def test_any_recipe_can_be_written_as_a_command() -> None:
    given = recipe(methods=("sgd", "looksam:rho=0.1,interval=3"), amp=True, channels_last=False, momentum=0.5, seeds=3)
    verb = parse(command_line(given).split()[1:])
    assert isinstance(verb, Compare)
    assert verb.recipe == given
