from pathlib import Path

from tiny import recipe
from tuning_results import result, tuning_result

from steppe.experiments.commands import Compare, parse
from steppe.experiments.tuning.confirm import command_line
from steppe.experiments.tuning.result import Search, summarize_search
from steppe.experiments.tuning.search_space import spaces
from steppe.experiments.tuning.studies import TrialResult


def test_confirmation_uses_fresh_seeds_and_can_be_parsed() -> None:
    found = tuning_result(result(0, 0.0, 80.0, 81.0, 82.0, method="sgd"), result(0, 0.123, 84.0, 85.0, 86.0))
    (line,) = found.commands
    verb = parse(line.split()[1:])
    assert isinstance(verb, Compare)
    assert [*map(str, verb.recipe.comparison.methods)] == ["sgd", "sam:rho=0.123"]
    assert (verb.recipe.comparison.first_seed, verb.recipe.comparison.seeds, verb.recipe.model.width) == (3, 3, 2)
    assert verb.recipe.output.out == Path("runs/demo-tune-confirmed")


def test_any_recipe_can_be_written_as_a_command() -> None:
    given = recipe(methods=("sgd", "looksam:rho=0.1,interval=3"), amp=True, channels_last=False, momentum=0.5, seeds=3)
    verb = parse(command_line(given).split()[1:])
    assert isinstance(verb, Compare)
    assert verb.recipe == given


def test_methods_with_different_options_are_confirmed_separately() -> None:
    given = recipe(seeds=3)
    found = spaces(given, ["lr=0.01,0.1"], baseline=True)
    runs = result(0, 0.1, 80.0, 81.0, 82.0).runs
    results = [
        TrialResult("sgd", 0, {"lr": 0.1}, "complete", runs),
        TrialResult("sam", 0, {"lr": 0.01}, "complete", runs),
    ]
    one, two = summarize_search(Search(given, found, "accuracy", 6, Path("runs/x")), results).commands
    assert "--methods sgd " in one
    assert "--lr 0.1" in one
    assert "--methods sam " in two
    assert "--lr 0.01" in two
    assert one.split()[-1] != two.split()[-1]
