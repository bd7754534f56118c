"""The command line: default recipe, options, help, and errors of one line."""

import builtins
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import command_line, options

import steppe
from steppe.cli import main, typos
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe
from steppe.methods.registry import CARDS


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the printed text as one line."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize("words", [["compare", "demo", "--help"], pytest.param(["methods"], marks=pytest.mark.slow)])
def test_output_that_nobody_reads_to_its_end_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run([sys.executable, "-m", "steppe", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (found.stderr, found.returncode) == ("", 1)


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert printed(capsys) == f"steppe {steppe.__version__}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--epoch", "3"], "compare has no option --epoch; did you mean '--epochs'? `steppe compare demo"),
        (["compare", "--batch_sise=3"], "has no option --batch-sise; did you mean '--batch-size'?"),
        (["tune", "article", "--serch", "rho"], "has no option --serch; did you mean '--search'? `steppe tune article"),
        (["compare", "--tensorboard"], "has no option --tensorboard; it is now --log tensorboard."),
        (["compare", "artcle"], "there is no recipe 'artcle'; did you mean 'article'? `steppe compare --help` lists"),
        (
            ["tune", "xyz"],
            "there is no recipe 'xyz'. A task of your own is package.module:name. `steppe tune --help` lists",
        ),
        (["compare", "--methods", "samm"], "'samm' is unknown; did you mean 'sam'?"),
        (["compare", "--dataset", "fashion-mnst"], "'fashion-mnst' is unknown; did you mean 'fashion-mnist'? Known:"),
        (["compare", "--device=gpu"], "--device: 'gpu' is unknown; did you mean 'cpu'? Known: auto, cpu, cuda"),
        (["compare", "--log", "tensorbord"], "did you mean 'tensorboard'?"),
        (["compare", "--epochs", "0"], "the compute that each method gets"),
        (["compare", "--epochs", "ten"], "--epochs: 'ten' is not a whole number"),
        (["compare", "--lr"], "--lr needs a value, FLOAT: `steppe compare demo --help` explains it"),
        (["compare", "--lr", "--seeds", "3"], "--lr needs a value"),
        (["compare", "article", "--rho", "-1"], "steppe: rho=-1.0: the radius of SAM's neighborhood"),
        (["comprae"], "there is no command 'comprae'; did you mean 'compare'? `steppe --help` lists the commands"),
        (["comprae", "--help"], "there is no command 'comprae'; did you mean 'compare'?"),
        (["compare", "artcle", "--help"], "there is no recipe 'artcle'; did you mean 'article'?"),
        (["--versoin"], "steppe has no option --versoin; did you mean '--version'? `steppe --help`"),
        (["measure", "--foo"], "`steppe measure --help` lists the options"),
        (["tune", "--foo"], "`steppe tune demo --help` lists the options"),
        (["plot"], "The run folder, for example runs/demo"),
        (["recipes", "artcle"], "recipes: there is no 'artcle'; did you mean 'article'?"),
        (["completion", "fsh"], "completion: there is no 'fsh'; did you mean 'fish'?"),
        (["completion"], "completion: name the shell, one of bash, zsh, fish"),
        ([], "name a command, one of compare, finetune, tune, measure, plot, methods, recipes, completion"),
    ],
)
def test_wrong_command_line_is_one_line_with_a_suggestion(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("steppe: ")
    assert message in err


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "demo", "--batch_size=16", "--no-amp", "--lr", "1e-3", "--methods", "sgd", "sam:rho=0.1"],
        ["compare", "my_project:task", "--freeze", "--clip", "None", "--out", "runs/a"],
        ["tune", "--search", "rho=0.1..1", "lr=0.1", "--log"],
        ["measure", "--names", "a", "b"],
        ["finetune", "--shots", "10", "--json"],
    ],
)
def test_right_command_line_has_no_typo(words: list[str]) -> None:
    assert typos.check(words) is None


@pytest.mark.parametrize("words", [["compare"], ["compare", "--rho", "0.1"], ["compare", "demo"]])
def test_demo_is_the_default(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[object] = []
    monkeypatch.setattr("steppe.experiments.commands.compare", lambda recipe, *_: recipes.append(recipe))
    assert main(words) == 0
    (recipe,) = recipes
    assert (recipe.name, recipe.training.rho) == ("demo", 0.1 if "--rho" in words else 0.05)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "amp", "graphs"),
    [
        ([], None, None),
        (["--amp", "--seeds", "2"], True, None),
        (["--no-amp", "--cuda_graphs"], False, True),
        (["--amp", "False", "--no-cuda-graphs"], False, False),
        (["--amp", "None"], None, None),
    ],
)
def test_options_with_an_automatic_default_take_values(
    words: list[str], amp: bool | None, graphs: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr("steppe.experiments.commands.compare", lambda recipe, *_: recipes.append(recipe))
    assert main(["compare", *words]) == 0
    assert (recipes[0].hardware.amp, recipes[0].hardware.cuda_graphs) == (amp, graphs)


def test_errors_are_printed_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "is not a run folder" in err


def list_methods(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["methods", *words]) == 0
    return capsys.readouterr().out


def test_methods_are_listed_by_name_and_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    table = list_methods([], capsys)
    assert max(map(len, table.splitlines())) <= 100
    names = [line.split()[0] for line in table.splitlines() if not line.startswith(" ")]
    assert [n for n in names if n in CARDS] == list(CARDS)
    assert "1 + 1/interval" in table
    assert "Zhuang et al. 2022" in table
    some = list_methods(["look*", "RST"], capsys)
    assert all(name in some for name in ("looksam", "lookbehind_sam", "random_sam"))
    assert "gsam" not in some.partition("Cost:")[0]


@pytest.mark.parametrize("name", ["gsam", "GSAM", "Late SAM", "fraction_sam"])
def test_single_method_shows_its_card(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Checked against" in list_methods([name], capsys)


def test_card_is_complete_at_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = list_methods(["gsam"], capsys)
    assert "±" in text
    assert "…" not in text


def test_wildcard_with_one_match_prints_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert "when to use it" in list_methods(["gs*"], capsys)


def test_bibtex_option_prints_the_entries_of_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    entries = list_methods(["gsam", "looksam", "--bibtex"], capsys)
    assert re.findall(r"^@\w+\{(\w+),$", entries, flags=re.MULTILINE) == [
        "foret2021sam",
        "zhuang2022gsam",
        "liu2022looksam",
    ]


def test_error_for_an_unknown_method_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "sam", "loksam"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no method matches 'loksam'; did you mean 'looksam'?" in err


def test_error_for_a_wrong_data_folder_names_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--dataset", "fashion-mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert str(tmp_path) in printed(capsys)


def test_error_for_an_unwritable_folder_names_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["compare", "--out", str(tmp_path / "file" / "run")]) == 1
    assert f"Not a directory: {tmp_path / 'file' / 'run'}" in printed(capsys)


def test_interrupt_while_loading_prints_the_command_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steppe.experiments.data.datasets.load", interrupted)
    words = ["compare", "demo", "--out", str(tmp_path / "a folder")]
    assert main(words) == 130
    assert f"To resume: steppe compare demo --out '{tmp_path}/a folder'" in printed(capsys)


def test_interrupt_while_libraries_are_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid("rich", monkeypatch, KeyboardInterrupt())
    assert main(["plot", "runs/demo"]) == 130
    assert capsys.readouterr().err == "\nStopped. To resume: steppe plot runs/demo\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_loading_is_shown_and_ended_by_ctrl_c_in_one_line() -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-m", "steppe", "plot", "runs/demo"], stderr=theirs, stdout=theirs)
    os.close(theirs)
    shown = b""
    while not shown.endswith(b"...\r"):
        shown += os.read(ours, 1000)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert shown + os.read(ours, 1000) == b"Loading PyTorch ...\r\r\nStopped. To resume: steppe plot runs/demo\r\n"
    os.close(ours)


def test_full_disk_names_the_file_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["compare", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"No space left on device: {tmp_path}/run/" in err
    assert "Make room, and give the same command again" in err


def forbid(name: str, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    """Make `import name` fail, as if the package were not installed unless another error is given."""
    real = builtins.__import__

    def guarded(module: str, *args: object, **kwargs: object) -> ModuleType:
        if module.partition(".")[0] == name:
            raise error or ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_error_for_a_missing_extra_gives_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid("rich", monkeypatch)
    assert main(["compare"]) == 1
    assert printed(capsys).endswith("rich is not installed, and experiments need it: pip install 'steppe[experiments]'")


def test_error_for_a_missing_tensorboard_gives_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib  # noqa: F401 (imported first, so that its own imports do not fail)

    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert main(["compare", "--log", "tensorboard", "--out", str(tmp_path / "run")]) == 1
    assert "pip install 'steppe[tensorboard]'" in printed(capsys)


def of_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command with --json, which prints one document and nothing else on stdout; return it."""
    assert command_line([*words, "--json"], draws=False) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_json_of_a_comparison_and_of_its_figures_is_their_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = of_json(["compare", "demo", *options(out=tmp_path, epochs=2)], capsys)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert found == {"folder": str(tmp_path), **summary}
    assert [row["method"] for row in found["rows"]] == ["sgd", "sam"]
    assert of_json(["plot", str(tmp_path)], capsys) == found


def test_json_keeps_progress_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["compare", "demo", *options(out=tmp_path, epochs=2), "--json"], draws=False) == 0
    assert "standardized epoch 2/2" in capsys.readouterr().err


def test_json_of_methods_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    (gsam,) = of_json(["methods", "gsam"], capsys)["methods"]
    assert gsam["name"] == "gsam"
    assert CARDS["gsam"].paper.url in [paper["url"] for paper in gsam["papers"]]
    found = {one["name"]: one["options"] for one in of_json(["recipes"], capsys)["recipes"]}
    assert found.keys() == RECIPES.keys()
    assert found["article"]["--epochs"] == str(RECIPES["article"][0].comparison.epochs)
    assert [one["name"] for one in of_json(["recipes", "vit"], capsys)["recipes"]] == ["vit"]


def test_error_with_json_leaves_stdout_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.slow
def test_streams_that_cannot_encode_a_character_print_a_plain_one() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    command = [sys.executable, "-m", "steppe", "methods", "gsam"]
    found = subprocess.run(command, env=environment, capture_output=True, check=True)
    text = found.stdout.decode("ascii")
    assert "+/-" in text
    assert "\x1b" not in text  # nor any other control character
    assert found.stderr == b""


def test_stream_that_cannot_encode_a_character_prints_a_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["methods", "gsam"]) == 0
    assert "+/-" in written.getvalue().decode("ascii")


@pytest.mark.slow
def test_long_commands_say_at_once_that_libraries_are_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steppe", "measure", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    loading, error = found.stderr.splitlines()
    assert (found.returncode, found.stdout, loading) == (1, "", "Loading PyTorch ...")
    assert "is not a run folder" in error
