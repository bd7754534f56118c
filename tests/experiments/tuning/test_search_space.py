import pytest
from tiny import recipe

from steppe.experiments.config.methods import Value
from steppe.experiments.tuning.search_space import Choices, Range, grid, read, spaces


@pytest.mark.parametrize(
    ("word", "kind", "wanted"),
    [
        ("rho=0.01..1", float, Range("rho", 0.01, 1.0, log=True)),
        ("rho=0..1:linear", float, Range("rho", 0.0, 1.0, log=False)),
        ("rho=.01..1:log", float, Range("rho", 0.01, 1.0, log=True)),
        ("interval=2..8", int, Range("interval", 2, 8, log=False, integer=True)),
        ("k=2..64:log", int, Range("k", 2, 64, log=True, integer=True)),
        ("rho=0.1,0.2", float, Choices("rho", (0.1, 0.2))),
        ("adaptive=true,false", bool, Choices("adaptive", (True, False))),
    ],
)
def test_words_are_read_and_written(word: str, kind: type[Value], wanted: object) -> None:
    dimension = read(word, kind)
    assert dimension == wanted
    assert read(str(dimension), kind) == dimension


@pytest.mark.parametrize(
    ("word", "kind", "lower", "upper"),
    [
        ("rho=0.01..1", float, "rho=0.001..0.1", "rho=0.1..10"),
        ("lr=0.05..0.2", float, "lr=0.025..0.1", "lr=0.1..0.4"),
        ("k=2..64:log", int, "k=1..12:log", "k=11..363:log"),
    ],
)
def test_the_range_beyond_an_edge_is_as_wide_and_has_the_edge_in_its_middle(
    word: str, kind: type[Value], lower: str, upper: str
) -> None:
    dimension = read(word, kind)
    assert isinstance(dimension, Range)
    assert [str(dimension.beyond(edge)) for edge in ("lower", "upper")] == [lower, upper]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["rho"], "'rho' names no values to try: write NAME=LOW..HIGH"),
        (["rho="], "names no values to try"),
        (["rho=1..0.1"], "the range is empty"),
        (["rho=0..1"], "a logarithmic range cannot begin at 0.0: begin above 0, or write rho=0..1:linear"),
        (["rho=0.1..1:logarithmic"], "'logarithmic' is no scale; use log or linear"),
        (["rho=0.1"], "give two or more different values"),
        (["rho=0.1,0.1"], "give two or more different values"),
        (["rho=0.1,high"], "'high' must be a finite number"),
        (["rho=0.1..nan"], "'nan' must be a finite number"),
        (["batch_size=8.5..16"], "'8.5' must be a whole number"),
        (["rho=0.1..1", "rho=0.2,0.3"], "give each name once"),
        (["roh=0.1..1"], "'roh' is unknown; did you mean 'rho'?"),
        (["epochs=2,4"], "epochs is the same for all trials"),
        (["width=2,4"], "width is the same for all trials"),
        (["lr=-1..1:linear"], "lr=-1..1:linear: lr=-1.0: the learning rate must be"),
    ],
)
def test_error_in_a_word_is_explained(words: list[str], answer: str) -> None:
    with pytest.raises(ValueError, match="^search") as error:
        spaces(recipe(), words, baseline=True)
    assert answer in str(error.value)


def test_grid_needs_values() -> None:
    assert grid([Choices("a", (1, 2)), Choices("b", ("x",))]) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    with pytest.raises(ValueError, match=r"rho=0.1..1 is a range, and a grid needs its values"):
        grid([Range("rho", 0.1, 1.0, log=True)])


def test_default_is_a_range_around_the_rho_of_each_method_and_a_plain_baseline() -> None:
    base, sam, asam = spaces(recipe(methods=("sam", "asam")), [], baseline=True)
    assert (*map(str, base.recipe.comparison.methods), base.dimensions) == ("sgd", ())
    assert (*map(str, sam.recipe.comparison.methods), sam.dimensions) == ("sam", (Range("rho", 0.005, 0.5, log=True),))
    assert asam.dimensions == (Range("rho", 0.05, 5.0, log=True),)
    assert [space.usual() for space in (sam, asam)] == [{"rho": 0.05}, {"rho": 0.5}]
    assert len(spaces(recipe(methods=("sam",)), [], baseline=False)) == 1


def test_options_of_the_recipe_are_searched_for_the_baseline_too() -> None:
    base, looksam = spaces(
        recipe(methods=("looksam:interval=4",)), ["lr=0.01..0.1", "interval=2..8", "rho=0.1,0.2"], baseline=True
    )
    assert [d.name for d in base.dimensions] == ["lr"]
    assert [d.name for d in looksam.dimensions] == ["lr", "interval", "rho"]
    chosen = looksam.at({"lr": 0.02, "interval": 3, "rho": 0.1})
    assert (chosen.training.lr, *map(str, chosen.comparison.methods)) == (0.02, "looksam:rho=0.1,interval=3")


def test_all_methods_are_tuned_with_the_momentum_of_the_comparison() -> None:
    momenta = {space.recipe.base_momentum for space in spaces(recipe(methods=("sgd", "msam")), [], baseline=True)}
    assert momenta == {0.9}
