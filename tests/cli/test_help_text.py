"""The help: complete, in plain text, in 80 columns; and commands.json, which it is made from."""

import contextlib
import io
from pathlib import Path

import pytest

import make_command_line
from steppe.cli import help_text, main
from steppe.cli.grammar import grammar
from steppe.experiments.config.presets import RECIPES

COMMANDS = [[name] for name in grammar().commands]
EVERY = [[], *COMMANDS, *(["compare", name] for name in grammar().recipes), ["tune", "my_project:task"]]


def help_of(*words: str, width: int = 80) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        assert main([*words, "--help"]) == 0
    return printed.getvalue()


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_is_plain_text_in_80_columns_with_examples(words: list[str]) -> None:
    text = help_of(*words)
    assert text.isascii()
    assert [line for line in text.splitlines() if len(line) > 80 or line != line.rstrip()] == []
    assert text.startswith("usage: steppe")
    assert "\nexamples:\n" in text
    assert all(example in text for example, _ in grammar().commands[words[0]].examples) if words else "-V" in text


def test_help_follows_the_width_of_the_terminal() -> None:
    widths = {width: max(map(len, help_of("compare", "demo", width=width).splitlines())) for width in (60, 80, 100)}
    assert widths[60] < widths[80] < widths[100] <= 100


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["compare", "tune", "plot", "methods", "Begin with `steppe compare`", "Exit codes: 0 success", "130"]),
        (["compare"], ["demo", "article", "torchrun", "sam: SAM around the base", "here it is 128"]),
        (["compare", "demo"], ["--seeds INT", "one run gives no verdict", "Standardized epochs", "--json"]),
        (["tune", "demo"], ["--search STR ...", "--seeds INT", "{tpe,random,grid}"]),
        (["finetune"], ["--shots 10", "timm:", "--seeds INT"]),
        (["plot"], ["from the folder alone"]),
        (["methods"], ["have wildcards", "--bibtex"]),
        (["completion"], ['eval "$(steppe completion bash)"', "fish"]),
    ],
)
def test_help_explains_commands_and_options(words: list[str], parts: list[str]) -> None:
    text = " ".join(help_of(*words).split())
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("name", ["demo", "article", "annealed"])
def test_help_of_a_recipe_has_its_values(name: str) -> None:
    recipe, text = RECIPES[name][0], " ".join(help_of("compare", name).split())
    for option, value in (
        ("seeds", recipe.comparison.seeds),
        ("eval-every", recipe.evaluation.eval_every),
        ("schedule", recipe.training.schedule),
    ):
        after = text.partition(f"--{option} ")[2].partition(" --")[0]
        assert f"(default: {value})" in after


def test_width_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    assert help_text.width() == 40
    monkeypatch.setenv("COLUMNS", "500")
    assert help_text.width() == 100


def test_commands_file_is_that_of_the_commands() -> None:
    assert make_command_line.main(["--check"]) == 0, "run python scripts/make_command_line.py"


def test_stale_commands_file_is_named_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = make_command_line.FILE.read_text(encoding="utf-8")
    monkeypatch.setattr(make_command_line, "text", lambda: written)
    monkeypatch.setattr(make_command_line, "FILE", tmp_path / "commands.json")
    assert make_command_line.main(["--check"]) == 1
    assert "run python scripts/make_command_line.py" in capsys.readouterr().err
    assert make_command_line.main([]) == 0
    assert make_command_line.main(["--check"]) == 0
