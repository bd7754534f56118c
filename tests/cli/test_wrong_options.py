"""What is found to be wrong only with the task that a command line names is one line too, and no traceback."""

import re
from pathlib import Path

import pytest

from steppe.cli import main


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("own_flowers.py:task", "name the module as in an import, own_flowers:task"),
        ("./own/flowers.py:task", "name the module as in an import, own.flowers:task"),
        ("my-task:task", "a module that is called 'my-task' cannot be imported, .*: rename the file or folder"),
        ("own_flowers:", "write package.module:name, a module and the name of an object in it, as flowers:task"),
        ("own_flowers:task()", "write package.module:name, a module and the name of an object in it, as flowers:task"),
    ],
)
@pytest.mark.parametrize(
    "words", [["compare", "{}"], ["tune", "{}"], ["compare", "user_tasks:regression", "--then", "{}"]]
)
def test_what_cannot_be_a_name_is_one_line_that_says_how_to_write_it(
    words: list[str], name: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "tune":
        pytest.importorskip("optuna")
    assert main([word.format(name) for word in words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    option = "then" if "--then" in words else "task"
    assert re.fullmatch(rf"steppe: {option}={re.escape(repr(name))}: {remedy}", line)


@pytest.mark.parametrize(
    ("words", "beginning"),
    [
        (["compare", "--runs-at-once", "0"], "runs_at_once=0: "),
        (["tune", "--trials", "0"], "trials=0: "),
        (["measure", "run", "--samples", "0"], "samples=0: "),
        (["measure", "run", "--further", "foo"], "further='foo': "),
        (["compare", "--methods", "sam:rho=x"], "--methods: sam:rho=x: "),
        (["compare", "--methods", "no_module:f"], "--methods: there is no module no_module"),
        (["compare", "user_tasks:regression", "--widths", "4"], "widths=4: task=user_tasks:regression brings the mod"),
    ],
)
def test_message_begins_with_the_option_and_not_with_inner_names(
    words: list[str], beginning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"steppe: {beginning}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["compare", "own_flowers:one_cycle", "--warmup", "0.1"],
            "with the schedule of the task, warmup=0.1: .*leave --w",
        ),
        (["tune", "user_tasks:regression", "--objective", "mes"], "objective: 'mes' is unknown; did you mean 'mse'"),
    ],
)
def test_option_that_does_not_fit_the_task_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "from user_tasks import regression\n\ndef one_cycle():\n    return regression(schedule='one-cycle')\n"
    (tmp_path / "own_flowers.py").write_text(text)
    if words[0] == "tune":
        pytest.importorskip("optuna")
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"steppe: {message}", line)
