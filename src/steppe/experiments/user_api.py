"""Comparisons, searches and measurements from Python; the command line is in :mod:`.commands`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch.optim import Optimizer

from steppe.experiments import comparison
from steppe.experiments.analysis.verdicts import read_flatness
from steppe.experiments.config.presets import RECIPES, name_of_task
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import closest
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.execution.logs import Log
from steppe.experiments.measuring.flatness_result import FlatnessResult
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.measure_runs import measure_runs
from steppe.experiments.report.comparison_result import ComparisonResult
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.tasks.task import Task
from steppe.experiments.tuning.options import TuningOptions
from steppe.experiments.tuning.search_result import SearchResult
from steppe.experiments.tuning.tune import is_tuning
from steppe.experiments.tuning.tune import tune as train_trials
from steppe.experiments.world import is_first_process
from steppe.flatness import Budget

Methods = Sequence[str | Callable[..., Optimizer]]
"""Methods by their names, or as functions."""


def compare(
    task: Task | Callable[[], Task] | str,
    methods: Methods = ("base", "sam"),
    *,
    epochs: int = 20,
    seeds: int = 3,
    out: str | Path | None = None,
    runs_at_once: int = 1,
    log: str | Log | Sequence[str | Log] = (),
    quiet: bool = False,
    **options: Any,
) -> ComparisonResult:
    """Train methods on a task at equal compute, and compare them with the first one.

    Finished runs of the folder are kept, and a stopped comparison goes on where it was.

    Args:
        task: A :class:`Task`, a function that returns one, or the name of either, "package.module:task". By a name, or
            as a function of an importable module, the task can be measured by `steppe measure` as well.
        methods: Names as on the command line ("sam", "sam:rho=0.1", "base+ema", "package.module:function"), or
            functions (base, rho=0.05, ...) -> optimizer. The first one is what the others are compared with.
        epochs: Standardized epochs: the compute of each method, in gradient evaluations by training samples. An epoch
            of SAM counts as 2.
        seeds: Runs of each method. One gives no verdict.
        out: The run folder; by default runs/NAME. It holds the runs of one task: another object is an error there.
        runs_at_once: Runs at a time, each in a process of its own. Above 1, a script needs its calls under
            `if __name__ == "__main__":`.
        log: Where to log the measurements as well: "tensorboard", "wandb", "mlflow", a :class:`Log` of your own, or
            several of them.
        quiet: True to print nothing.
        **options: Any other option of `steppe compare task --help`, such as rho, lr, batch_size, schedule, eval_every,
            device, with underscores.

    Returns:
        The result, with its table, verdicts, advice and figures.

    Raises:
        ExperimentError: The task has an error, or a run failed; the message names the function and the reason.
        TypeError: There is no option of that name.
        ValueError: A method is unknown, or an option is out of range.

    Example:
        >>> import tempfile, torch
        >>> inputs, targets = torch.randn(48, 5), torch.randn(48, 1)
        >>> task = Task(
        ...     model=lambda: torch.nn.Linear(5, 1),
        ...     train=(inputs[:32], targets[:32]),
        ...     test=(inputs[32:], targets[32:]),
        ...     loss=torch.nn.functional.mse_loss,
        ...     optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        ... )
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = compare(task, ["base", "sam:rho=0.1"], epochs=1, seeds=1, out=out, quiet=True)
        >>> [row.method.label for row in result.summary.rows]
        ['base', 'SAM (rho 0.1)']
    """
    asked = [log] if isinstance(log, str | Log) else list(log)
    own = [one for one in asked if isinstance(one, Log)]
    names = [one for one in asked if one not in own]
    recipe, execution, given = _setup(
        compare, task, methods, runs_at_once, options, epochs=epochs, seeds=seeds, out=out, log=names
    )
    console = _console(quiet)
    comparison.compare(recipe, ["steppe.experiments.compare", recipe.data.task], console, execution, given, own)
    folder = RunFolder(recipe.folder)
    trained = folder.recipe().replace(out=recipe.folder, methods=recipe.comparison.methods)
    results = folder.results(trained)
    return ComparisonResult(trained, results, comparison.summarize_folder(folder, trained, results, console), given)


def tune(
    task: Task | Callable[[], Task] | str,
    methods: Methods = ("base", "sam"),
    *,
    search: str | Sequence[str] = (),
    trials: int | None = None,
    sampler: Literal["tpe", "random", "grid"] = "tpe",
    sampler_seed: int = 0,
    objective: str = "metric",
    hold_out: int = TuningOptions.hold_out,
    baseline: bool = True,
    storage: str | None = None,
    epochs: int = 20,
    seeds: int = 3,
    out: str | Path | None = None,
    runs_at_once: int = 1,
    quiet: bool = False,
    **options: Any,
) -> SearchResult:
    """Search rho and other values of methods on a task at equal compute, judged by data held out of training.

    It is `steppe tune`. Finished trials of the folder are kept, a stopped search goes on where it was, and more
    `trials` add some. The test data are not used: compare the methods of `result.best` on them, with fresh seeds.

    Args:
        task: As for :func:`compare`.
        methods: Names as on the command line, or functions of importable modules. Each is searched on its own.
        search: What to search, "rho=0.01..1" for a range (logarithmic for real numbers) or "lr=0.01,0.1" for values,
            or several of these. By default rho, from a tenth of each method's usual value to ten times that.
        trials: Trials of each method; by default 20, or the whole of a grid.
        sampler: "tpe" prefers values near those of good trials, "random" draws values independently, "grid" tries all
            combinations of values.
        sampler_seed: Seed of the values.
        objective: What the best trial is best in, on the validation data: "metric" for the task's first metric, "loss",
            another metric by its name, or after a second task "NAME after the second task".
        hold_out: One in so many training samples is held out for validation, if the task has no `validation` data.
        baseline: True to train the plain base as well, as the level to beat.
        storage: The URL of a database that Optuna supports, for many machines; by default a file in the run folder.
        epochs: Standardized epochs, the compute of each run, as for :func:`compare`.
        seeds: Runs of each trial. One gives no measure of the noise.
        out: The run folder; by default runs/NAME-tune.
        runs_at_once: Runs at a time, as for :func:`compare`. With "tpe" and above 1, the values that are tried depend
            on which runs end first.
        quiet: True to print nothing.
        **options: Any other option of `steppe tune task --help`, with underscores.

    Returns:
        The result, with the best values, its table, the commands that confirm them, and its figures.

    Raises:
        ExperimentError: The task has an error, nothing can be held out, a run failed, or Optuna is not installed.
        TypeError: There is no option of that name.
        ValueError: A method or a searched name is unknown, or a value is out of range.

    Example:
        >>> import tempfile, torch
        >>> inputs, targets = torch.randn(48, 5), torch.randn(48, 1)
        >>> task = Task(
        ...     model=lambda: torch.nn.Linear(5, 1),
        ...     train=(inputs[:32], targets[:32]),
        ...     test=(inputs[32:], targets[32:]),
        ...     loss=torch.nn.functional.mse_loss,
        ...     optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        ... )
        >>> with tempfile.TemporaryDirectory() as out:
        ...     grid = {"search": "rho=0.05,0.1", "sampler": "grid"}
        ...     result = tune(task, ["sam"], **grid, epochs=1, seeds=1, out=out, quiet=True)
        >>> len(result.trials), result.best[0], result.best[1] in ("sam:rho=0.05", "sam:rho=0.1")
        (3, 'base', True)
    """
    tuning = TuningOptions(
        (search,) if isinstance(search, str) else tuple(search),
        trials,
        sampler,
        sampler_seed,
        objective,
        hold_out,
        baseline,
        storage,
    )
    recipe, execution, given = _setup(tune, task, methods, runs_at_once, options, epochs=epochs, seeds=seeds, out=out)
    command = ["steppe.experiments.tune", recipe.data.task]
    return SearchResult(train_trials(recipe, tuning, command, _console(quiet), execution, given))


def measure(
    folder: ComparisonResult | str | Path,
    *,
    task: Task | None = None,
    samples: int = MeasuringOptions.samples,
    batch_norm: Literal["eval", "train"] = "eval",
    batch_size: int = MeasuringOptions.batch_size,
    processes: int = 1,
    quiet: bool = False,
    **budget: Any,
) -> FlatnessResult:
    """Measure how flat the minima of a comparison's runs are, and compare the methods.

    It is `steppe measure`. Runs that were measured with the same options are not measured again. The folder's summary
    and report.html have the measures from then on.

    Args:
        folder: The result of :func:`compare`, or a run folder.
        task: The task of a run folder, if it was compared as an object and not by its name.
        samples: Training samples to measure on, drawn by the run's seed.
        batch_norm: "eval" for BatchNorm's running statistics, "train" for those of each batch.
        batch_size: Samples in memory at a time.
        processes: Runs to measure at a time. Above 1, each is in a process of its own, and a script needs its calls
            under `if __name__ == "__main__":`.
        quiet: True to print nothing.
        **budget: The radii and the effort, fields of :class:`steppe.flatness.Budget`: rho, ascent_steps, points, ...

    Returns:
        The measures, with their table, verdicts and figures.

    Raises:
        ExperimentError: The folder has no finished runs, its task is not known here or has data of which no samples can
            be drawn, or a measure cannot be computed.
        TypeError: There is no option of that name.
        ValueError: An option is out of range.

    Example:
        >>> from steppe.experiments import measure
        >>> result = measure("runs/flowers")  # doctest: +SKIP
        >>> [verdict.word for verdict in result.verdicts]  # doctest: +SKIP
        ['flatter']
    """
    _check_names(measure, budget, [one.name for one in fields(Budget)])
    options = MeasuringOptions(samples, batch_norm, batch_size, Budget(**budget), processes)
    console = _console(quiet)
    if isinstance(folder, ComparisonResult):
        path = folder.folder
        measure_runs(path, options, console, task or folder.task, folder.recipe.comparison.methods)
    else:
        if not isinstance(folder, str | Path) or is_tuning(Path(folder)):
            raise TypeError(f"measure: the result or the folder of a comparison is needed, not {_in_words(folder)}")
        path = Path(folder)
        measure_runs(path, options, console, task)
    comparison.plot(path, console)
    recipe = RunFolder(path).recipe().replace(out=path)
    return FlatnessResult(recipe, read_flatness(RunFolder(path), recipe))


def _setup(
    function: Callable[..., Any],
    task: Task | Callable[[], Task] | str,
    methods: Methods,
    runs_at_once: int,
    options: Mapping[str, Any],
    **given: Any,
) -> tuple[Recipe, ExecutionOptions, Task | None]:
    """Return the recipe, how to train, and the task itself if it has no name, from the arguments of a user's call."""
    usual, execution = RECIPES["task"][0], {one.name for one in fields(ExecutionOptions)}
    _check_names(function, options, [*(usual.options().keys() - {"task", "widths"}), *execution])
    name, own = _named(task)
    label = name_of_task(name) if own is None else own.name if own.name != "task" else name
    said = {
        "name": label if label.isidentifier() else "task",
        "task": name,
        "methods": [methods] if isinstance(methods, str) or callable(methods) else methods,
        **given,
        **{key: value for key, value in options.items() if key not in execution},
    }
    how = {key: value for key, value in options.items() if key in execution}
    if how.get("on", "local") == "local":
        how["runs_at_once"] = runs_at_once
    return usual.replace(**said), ExecutionOptions(**how), own


def _console(quiet: bool) -> Console:
    """Return where a function prints: nowhere in the processes of torchrun after the first one."""
    return Console(quiet=quiet or not is_first_process(), emoji=False)


def _check_names(function: Callable[..., Any], given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError for an option that there is not, with the closest one."""
    named = [name for name in inspect.signature(function).parameters if name not in ("options", "budget")]
    for name in given:
        if name not in known:
            raise TypeError(f"{function.__name__}: there is no option {name!r}{closest(name, [*named, *known])}")


def _in_words(folder: Any) -> str:
    return f"the folder of a search, {folder}" if isinstance(folder, str | Path) else type(folder).__name__


def _named(task: Task | Callable[[], Task] | str) -> tuple[str, Task | None]:
    """Return the name of a task, and the task itself if it cannot be imported by that name."""
    if isinstance(task, str):
        return task, None
    if isinstance(task, Task):
        return task.name.replace(":", " "), task  # a colon is a name's by which a task can be imported
    module, qualified = getattr(task, "__module__", "__main__"), getattr(task, "__qualname__", "<>")
    if module != "__main__" and "<" not in qualified:
        return f"{module}:{qualified}", None
    return str(getattr(task, "__name__", "task")), task()
