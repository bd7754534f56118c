"""Names of objects in a user's code that are misspelt: the error names the nearest one, and where it looked."""

import sys
from pathlib import Path

import pytest

from steppe.experiments import compare
from steppe.experiments.config.methods import find
from steppe.experiments.entry_points import load_entry_point
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.load import load_task


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module and a package."""
    (tmp_path / "spelling.py").write_text("class Tasks:\n    digits = 3\n\ndef task():\n    return 3\n")
    (tmp_path / "spellings").mkdir()
    (tmp_path / "spellings" / "__init__.py").touch()
    (tmp_path / "spellings" / "images.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("spelling:tsk", "'task'"),
        ("spelling:Tasks.digit", "'digits'"),
        ("speling:task", "'spelling'"),
        ("spellings.image:task", "'spellings.images'"),
        ("spelling:something_else", None),
        ("nowhere:task", None),
    ],
)
@pytest.mark.parametrize("option", ["task", "then", "model"])
def test_error_names_the_nearest_name_and_the_place(option: str, name: str, close: str | None, folder: Path) -> None:
    with pytest.raises(ExperimentError) as raised:
        (load_entry_point if option == "model" else lambda option, name: load_task(name, option))(option, name)
    message = str(raised.value)
    assert message.startswith(f"--{option} {name}: ")
    assert str(folder) in message
    assert message.endswith(f"; did you mean {close}?") if close else "did you mean" not in message


def test_object_of_another_type_names_the_option() -> None:
    with pytest.raises(
        ExperimentError, match=r"^--then spelling:task gives int: a steppe\.experiments\.Task is needed"
    ):
        load_task("spelling:task", "then")


def test_function_of_a_method_that_is_misspelt_has_the_same_error() -> None:
    with pytest.raises(ValueError, match=r"--methods spelling:tsk: .* has no tsk; did you mean 'task'\?$"):
        find("spelling:tsk")


def test_what_cannot_be_a_name_is_a_value_error_in_python() -> None:
    with pytest.raises(ValueError, match=r"^task='spelling\.py:task': name the module as in an import, spelling:task"):
        compare("spelling.py:task")
