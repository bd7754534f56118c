"""The completion: what can follow, and the scripts in real shells, where they are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from steppe.cli import completion, main
from steppe.cli.grammar import SHELLS, grammar
from steppe.experiments.config.methods import METHODS


def names(*words: str) -> list[str] | None:
    found = completion.candidates(words)
    return None if found is None else [name for name, _ in found]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["m"], ["measure", "methods"]),
        (["compare", "art"], ["article"]),
        (["compare", "demo", "--see"], ["--seeds"]),
        (["compare", "--no-am"], ["--no-amp"]),
        (["compare", "--device", ""], ["auto", "cpu", "cuda"]),
        (["compare", "--methods", "sgd", "look"], ["lookbehind_sam", "looksam"]),
        (["compare", "--log", "tensorboard", "w"], ["wandb"]),
        (["compare", "--epochs", ""], []),
        (["compare", "--out", "ru"], None),
        (["measure", "--weights", "a.pt", ""], None),
        (["plot", ""], None),
        (["methods", "gs"], ["gsam"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["recipes", "vi"], ["vit"]),
        (["nothing", ""], []),
        (["--ver"], ["--version"]),
    ],
)
def test_candidates(words: list[str], expected: list[str] | None) -> None:
    assert names(*words) == expected


def test_every_command_method_and_recipe_is_a_candidate() -> None:
    assert names("") == list(grammar().commands)
    assert names("compare", "--methods", "") == list(METHODS)
    assert names("tune", "") == list(grammar().recipes)
    assert "--search" not in (names("compare", "--") or [])
    assert {"--search", "--seeds", "--json", "--help"} <= set(names("tune", "--") or [])


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == completion.SCRIPTS[shell]


IN_BASH = r"""
source <(steppe completion bash)
complete_line() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _steppe 2>/dev/null; echo "${COMPREPLY[*]}"; }
complete_line steppe compare art
complete_line steppe compare --device c
complete_line steppe compare --methods sam : rho = 0.1 gs
"""
IN_FISH = r"""
steppe completion fish | source
complete -C "steppe compare art" | string split -f1 \t
complete -C "steppe compare --device c" | string split -f1 \t | string join " "
complete -C "steppe compare --methods sam:rho=0.1 gs" | string split -f1 \t
"""
IN_ZSH = r"""
compdef() { :; }
_describe() { local -a all; all=("${(@P)3}"); print -r -- "${(@)all%%:*}"; }
eval "$(steppe completion zsh)"
complete_line() { words=("$@"); CURRENT=$#; _steppe; }
complete_line steppe compare art
complete_line steppe compare --device c
complete_line steppe compare --methods sam:rho=0.1 gs
"""


@pytest.mark.parametrize(("shell", "code"), [("bash", IN_BASH), ("fish", IN_FISH), ("zsh", IN_ZSH)])
def test_script_completes_in_the_shell(shell: str, code: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "steppe"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m steppe "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    found = subprocess.run([shell, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n") == ["article", "cpu cuda", "gsam", ""], found.stderr
