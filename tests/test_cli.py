"""The command line: default recipe, options, help, and errors of one line."""

import builtins
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import steppe
from steppe.cli import main
from steppe.experiments.config.recipe import Recipe
from steppe.methods.registry import CARDS


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the printed text without the frame around it."""
    captured = capsys.readouterr()
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", captured.out + captured.err).split())


@pytest.mark.parametrize("words", [["compare", "demo", "--help"], ["methods"]])
def test_output_that_nobody_reads_to_its_end_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run([sys.executable, "-m", "steppe", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (found.stderr, found.returncode) == ("", 1)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert printed(capsys) == f"steppe {steppe.__version__}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--epoch", "3"], "Perhaps you meant: --epochs"),
        (["compare", "artcle"], "there is no recipe 'artcle'; did you mean 'article'? `steppe compare --help` lists"),
        (["tune", "xyz"], "there is no recipe 'xyz'. `steppe tune --help` lists"),
        (["compare", "--methods", "samm"], "'samm' is unknown; did you mean 'sam'?"),
        (["compare", "--device", "gpu"], "Expected one of ('auto', 'cpu', 'cuda')"),
        (["compare", "--epochs", "0"], "the compute that each method gets"),
        (["compare", "--epochs", "ten"], "--epochs: invalid literal"),
        (["compare", "article", "--rho", "-1"], "rho=-1.0: the radius of SAM's neighborhood"),
        (["comprae"], "there is no command 'comprae'; did you mean 'compare'? `steppe --help` lists the commands"),
        (["measure", "--foo"], "run steppe measure --help"),
        (["tune", "--foo"], "run steppe tune demo --help"),
        (["plot"], "The run folder, for example runs/demo"),
        ([], "Expected one of {compare, tune, measure, plot, methods, finetune}"),
    ],
)
def test_wrong_command_line_is_reported_with_a_suggestion(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in printed(capsys)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--help"], ["compare", "tune", "plot", "methods", "Begin with `steppe compare`"]),
        (["compare", "--help"], ["demo", "article", "torchrun", "sam: SAM around the base", "here it is 128"]),
        (["compare", "demo", "--help"], ["--seeds INT", "one run gives no verdict", "Standardized epochs"]),
        (["plot", "--help"], ["from the folder alone"]),
        (["methods", "--help"], ["with wildcards", "--bibtex"]),
    ],
)
def test_help_explains_commands_and_options(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    text = printed(capsys)
    assert all(part in text for part in parts)


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
