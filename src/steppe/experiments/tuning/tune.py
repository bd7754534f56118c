"""Search rho and other values at equal compute, judged by data that are held out of training."""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.execution.launch import start_executor
from steppe.experiments.execution.prepared_task import prepare_task
from steppe.experiments.execution.pretraining import resolve_pretraining
from steppe.experiments.execution.progress import print_line
from steppe.experiments.storage.environment import record_session
from steppe.experiments.storage.files import (
    check_format,
    read_checked,
    read_checked_lines,
    write_checked,
    write_checked_lines,
)
from steppe.experiments.storage.records import AFTER
from steppe.experiments.storage.run_folder import RunFolder, check_same, check_unused
from steppe.experiments.tasks.digests import digests_of_object
from steppe.experiments.tasks.load import held_out, with_task
from steppe.experiments.tasks.samples import RandomStream
from steppe.experiments.tasks.task import Task
from steppe.experiments.tuning.figure import draw
from steppe.experiments.tuning.options import TuningOptions
from steppe.experiments.tuning.result import TuningResult, read_trial
from steppe.experiments.tuning.search_space import Space, Values, grid, spaces
from steppe.experiments.world import launched

_FORMAT = "steppe tuning, version 2"
_OTHER_FOLDER = "restore that file, or choose another folder with --out"


def check_search(recipe: Recipe, options: TuningOptions) -> None:
    """Raise a ValueError if the search space is not valid for the recipe."""
    if recipe.comparison.widths:
        widths = " ".join(map(str, recipe.comparison.widths))
        raise ValueError(
            f"widths={widths}: trials can be compared at one width only. Use --widths without a number, and --width"
        )
    if recipe.output.log:
        raise ValueError(
            f"log={' '.join(recipe.output.log)}: the trials of a search are kept in its folder only, and runs of "
            "different trials have the same names: leave it out, and log the comparison that confirms the best values"
        )
    if not recipe.data.task:
        options.metric(recipe)
    for method in recipe.comparison.methods:
        if method.function is not None:
            raise ValueError(
                f"methods: {method} is a function without a name by which it could be imported, and a search is read "
                "again from its folder: put it into a module of its own, and give it from there"
            )
    found = spaces(recipe, options.search, baseline=options.baseline)
    if options.sampler == "grid":
        for space in found:
            grid(space.dimensions)


def tune(
    recipe: Recipe,
    options: TuningOptions,
    command: Sequence[str],
    console: Console,
    execution: ExecutionOptions,
    given: Task | None = None,
) -> TuningResult:
    """Train the trials that are not trained yet, then write, print and draw the result.

    `given` is a task that has no name by which it could be imported.

    Raises Stopped and ExperimentError as `compare` does, and ValueError for an invalid search space.
    """
    check_search(recipe, options)
    if launched() > 1:
        raise ExperimentError(
            "steppe tune under torchrun: trials are independent runs, and need no processes that train one together. "
            "Start it without torchrun, with --on ray for many at a time, or several times in one run folder"
        )
    try:
        from steppe.experiments.tuning.studies import Study, open_storage, train_trials
    except ModuleNotFoundError as error:
        raise ExperimentError(
            f"{error.name} is not installed, and steppe tune needs it: pip install 'steppe[tune]'"
        ) from error
    recipe, task = with_task(resolve_pretraining(recipe, console), given)
    forgets = options.metric(recipe).name.endswith(AFTER)  # else a second task would take time, and decide nothing
    own = {} if task is None else _own_values(task, options)
    has_validation = task is not None and task.validation is not None
    # tpe chooses by the results so far: with several trials in progress, its values would depend on which ends first
    one_by_one = options.sampler == "tpe" and execution.on == "local" and execution.runs_at_once is None
    max_runs = recipe.comparison.seeds if one_by_one else None
    with (
        start_executor(recipe, execution, console, max_runs=max_runs) as executor,
        open_storage(options.storage, path := _folder(recipe)) as storage,
    ):
        depends_on = _depends_on(executor.recipe, options, has_validation=has_validation)
        found = spaces(executor.recipe, options.search, baseline=options.baseline)
        with RunFolder(path).locked(timeout=-1):
            folder_id = _claim(path, recipe, options, depends_on, has_validation=has_validation)
            words = [_without_password(word) for word in command]
            record_session(path / "environment.json", words, console, recipe.data.task, digests_of_object(task))
            inputs, shared = json.dumps(depends_on, sort_keys=True), None if options.storage is None else folder_id
            studies = [
                Study(space, storage, path, options, depends_on=inputs, folder_id=shared, own=own) for space in found
            ]
        make_task = prepare_task(executor, path, console, task, options.hold_out, forgets=forgets)
        try:
            train_trials(studies, executor, make_task, path, console, one_by_one=one_by_one)
        finally:
            with RunFolder(path).locked(timeout=-1):  # a copy of the database that can be read without Optuna
                results = chain.from_iterable(study.results() for study in studies)
                write_checked_lines(path / "trials.jsonl", [result.to_json() for result in results])
    return report_tuning(path, console)


def is_tuning(path: Path) -> bool:
    """True if the folder is one of a search, also if its config.json is damaged."""
    try:
        if json.loads((path / "config.json").read_text("utf-8"))["format"] == _FORMAT:
            return True
    except FileNotFoundError:
        return False
    except Exception:  # damaged, in any of many ways; the reader of the file names it
        pass
    return (path / "trials.jsonl").exists() or (path / "study.db").exists()


def report_tuning(path: Path, console: Console) -> TuningResult:
    """Write, print and draw the result, from the run folder alone."""
    recipe, options, found, has_validation = read_checked(path / "config.json", _configuration, _OTHER_FOLDER)
    remedy = "run the same `steppe tune` again, which writes it anew from the study"
    try:
        trials = read_checked_lines(path / "trials.jsonl", partial(read_trial, found), remedy)
    except FileNotFoundError as error:
        raise ExperimentError(f"{path / 'trials.jsonl'} is missing: {remedy}") from error
    result = TuningResult(recipe, options, found, path, trials, has_validation)
    folder = RunFolder(path)
    with folder.locked(timeout=-1):
        result.write(folder)
        draw(result, folder.figures)
    result.show(console)
    print_line(console, f"Figures: {folder.figures}")
    return result


def _own_values(task: Task, options: TuningOptions) -> Values:
    """Return the values of a task's own optimizer that can be searched, after a check of the data to judge by."""
    if task.validation is not None and options.hold_out != TuningOptions.hold_out:
        raise ExperimentError(
            f"hold_out={options.hold_out}: the task has validation data of its own (validation=), and nothing is held "
            "out of training: leave --hold-out out"
        )
    held_out(task, options.hold_out).samples("test")  # ExperimentError where nothing can be held out
    with RandomStream(0, 0, 0).active():
        groups = task.optimizer(task.new_model()).param_groups
    found = {name: {float(group[name]) for group in groups if name in group} for name in ("lr", "weight_decay")}
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def _folder(recipe: Recipe) -> Path:
    """Make the folder of a recipe's search, not that of its comparison; ExperimentError if it is used otherwise."""
    path = recipe.output.out if recipe.output.out is not None else Path("runs") / f"{recipe.name}-tune"
    if (path / "config.json").exists() and not is_tuning(path):
        raise ExperimentError(
            f"{path} is the folder of a comparison or of another version, not of `steppe tune`: choose another "
            "with --out"
        )
    path.mkdir(parents=True, exist_ok=True)
    check_unused(path)
    return path


def _claim(
    path: Path, recipe: Recipe, options: TuningOptions, depends_on: dict[str, Any], *, has_validation: bool
) -> str:
    """Make this the folder of a search, or check that it is already; return the folder's id."""
    file, folder_id = path / "config.json", uuid.uuid4().hex
    if file.exists():
        folder_id, before = read_checked(file, _claimed, _OTHER_FOLDER)
        check_same(path, before, depends_on)
    content = {
        "format": _FORMAT,
        "held_out": "the test measures and the gap of the trials are on validation data, not on the test data",
        "has_validation": has_validation,
        "id": folder_id,
        "recipe": recipe.to_json(),
        "options": {**asdict(options), "storage": None},
        "depends_on": depends_on,
    }
    write_checked(file, content)
    return folder_id


def _claimed(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the id of a folder and the values that its trials depend on."""
    _configuration(values)
    return str(values["id"]), dict(values["depends_on"])


def _configuration(values: dict[str, Any]) -> tuple[Recipe, TuningOptions, list[Space], bool]:
    check_format(values, _FORMAT)
    recipe, options = Recipe.from_json(values["recipe"]), values["options"]
    options = TuningOptions(**{**options, "search": tuple(options["search"])})
    if not isinstance(values["has_validation"], bool):
        raise TypeError(f"has_validation is {values['has_validation']!r}")
    return recipe, options, spaces(recipe, options.search, baseline=options.baseline), values["has_validation"]


def _depends_on(recipe: Recipe, options: TuningOptions, *, has_validation: bool) -> dict[str, Any]:
    """Return all values that the trials of a method depend on, as JSON has them, for the comparison with a file."""
    comparison = recipe.to_json()["comparison"]
    runs = {name: comparison[name] for name in ("seeds", "first_seed")}
    search = {name: value for name, value in asdict(options).items() if name not in ("trials", "storage")}
    judged = {"metrics": asdict(recipe.task)["metrics"], "has_validation": has_validation}
    values: dict[str, Any] = json.loads(json.dumps(recipe.result_options() | runs | search | judged))
    return values


def _without_password(word: str) -> str:
    """Keep a database's password out of the record.

    >>> _without_password("postgresql://me:secret@host/db")
    'postgresql://me:***@host/db'
    """
    return re.sub(r"(://[^:/@\s]+):[^@\s]+@", r"\1:***@", word)
