"""Measure the flatness of a user's model, from files of its weights, on the user's data."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from steppe.experiments import entry_points
from steppe.experiments.analysis.verdicts import read_flatness_file
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.progress import print_line
from steppe.experiments.figures.flatness import draw
from steppe.experiments.measuring import user_inputs
from steppe.experiments.measuring.flatness_table import TITLE, FlatnessTable
from steppe.experiments.measuring.jobs import MeasuringOptions, Prepared, Progress, measure_all
from steppe.experiments.measuring.normalization import takes_logits
from steppe.experiments.storage.environment import digest_of_module
from steppe.experiments.storage.files import write_atomically, write_checked
from steppe.experiments.storage.run_folder import RunFolder
from steppe.flatness import Flatness, normalized_logits
from steppe.flatness._batches import Batches, num_samples

_CROSS_ENTROPY = "torch.nn.functional:cross_entropy"


@dataclass(frozen=True)
class UserModel:
    """A model, its weights and its data."""

    model: str = ""
    """package.module:factory, called without arguments, which returns the network; or the network itself."""
    data: str = ""
    """package.module:factory, which returns the data: a tuple of tensors (inputs, targets) or a Dataset of such pairs,
    from which --samples are drawn by --seed, or batches (a DataLoader, a list), which are used as they are. It is
    called for each file and must return the same data each time; torch is seeded before. Augmentation must be off."""
    weights: tuple[Path, ...] = ()
    """Files of weights, a state dict each (torch.save, safetensors): several for several seeds of one method. Without
    any, the network is measured with the weights that the factory gives it."""
    against: tuple[Path, ...] = ()
    """Weights of a reference, paired with --weights in their order, for a verdict on which minima are flatter."""
    names: tuple[str, str] = ("ours", "reference")
    """The names of the two in the report."""
    loss: str = _CROSS_ENTROPY
    """package.module:function, (outputs, targets) -> mean loss of a batch."""
    evaluate: str | None = None
    """Instead of the loss, package.module:function, (model, batch) -> mean loss, for batches of any form; or -> (mean
    loss, outputs), which --further gauss_newton and fisher need."""
    out: Path = Path("flatness")
    """The folder for the results: a JSON file for each file of weights, summary.md, figures."""

    def __post_init__(self) -> None:
        for option, name in self.entry_points().items():
            if name:
                entry_points.check_name(option, name)
        if bool(self.model) != bool(self.data):
            given, missing = ("model", "data") if self.model else ("data", "model")
            raise ValueError(
                f"{given}={getattr(self, given)!r}, and no --{missing}: flatness is measured for a model on data"
            )
        if self.evaluate is not None and self.loss != _CROSS_ENTROPY:
            raise ValueError(
                f"loss={self.loss!r}, evaluate={self.evaluate!r}: give one of them, since each defines the loss"
            )
        if self.against and len(self.against) != len(self.weights):
            raise ValueError(
                f"against: {len(self.against)} files, and {len(self.weights)} are given with --weights: they are "
                "compared in pairs"
            )
        if self.names[0] == self.names[1] or not all(self.names):
            raise ValueError(f"names={' '.join(self.names)!r}: the two names must differ and not be empty")

    @property
    def setting(self) -> str:
        return f"{self.data}, {self.evaluate or self.loss}"

    def entry_points(self) -> dict[str, str | None]:
        return {option: getattr(self, option) for option in ("model", "data", "loss", "evaluate")}

    def network(self, seed: int) -> nn.Module:
        """Return the network, made by its factory with torch seeded."""
        found = entry_points.load_entry_point("model", self.model)
        if isinstance(found, nn.Module):
            return found
        if not callable(found):
            raise ExperimentError(
                f"--model {self.model} is {type(found).__name__}, neither a network nor a function that makes one"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = entry_points.call_factory("model", self.model, found)
        if not isinstance(made, nn.Module):
            raise ExperimentError(f"--model {self.model} gives {type(made).__name__}, and a torch.nn.Module is needed")
        return made

    def samples(self, options: MeasuringOptions) -> tuple[Any, str]:
        """Return the data to measure on, and their digest."""
        found = entry_points.load_entry_point("data", self.data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.budget.seed)
            given = entry_points.call_factory("data", self.data, found) if callable(found) else found
            data = user_inputs.prepare_data(given, self.data, options, pairs=self.evaluate is None)
            with entry_points.one_line_errors(f"--data {self.data}: iterating over it raised "):
                return data, user_inputs.digest_of_data(data)

    def digest_of_code(self) -> str:
        """Return the SHA-256 of the files of the modules that are named, but not of the modules that they import."""
        modules = set[str]()
        for option, name in self.entry_points().items():
            if name and name.partition(".")[0] != "torch":
                entry_points.load_entry_point(option, name)
                modules.add(name.partition(":")[0])
        return hashlib.sha256(" ".join(f"{m} {digest_of_module(m)}" for m in sorted(modules)).encode()).hexdigest()

    def function(self, option: str) -> Callable[..., Tensor]:
        name = getattr(self, option)
        found = entry_points.load_entry_point(option, name)
        if isinstance(found, type) and issubclass(found, nn.Module):  # torch.nn:MSELoss
            found = entry_points.call_factory(option, name, found)
        if not callable(found):
            raise ExperimentError(f"--{option} {name} is {type(found).__name__}, and no function")
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class UserModelJob:
    """A file of weights to measure, or the network with its own weights."""

    name: str
    weights: Path | None
    weights_sha256: str
    data_sha256: str
    code_sha256: str
    model: UserModel
    options: MeasuringOptions

    @property
    def path(self) -> Path:
        return self.model.out / f"{self.name}.json"

    def is_measured(self, console: Console) -> bool:
        """True if the file holds measures of these weights and data, with these options.

        Prints a note if they are of other weights, data or code under the same names: nothing but the digest tells a
        damaged file that can still be read from an intact one.
        """
        _, content = read_flatness_file(self.path)
        if content and "inputs" not in content:
            raise ExperimentError(
                f"{self.path} has the measures of another model and would be lost: choose another --out"
            )
        if not content:
            return False
        before, now = content["inputs"], self.inputs()
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        if changed and set(changed) <= self._digests.keys() and content.get("weights") == str(self.weights):
            names = {
                "weights_sha256": str(self.weights or self.model.model),
                "data_sha256": self.model.data,
                "code_sha256": f"the code of {self.model.model}",
            }
            digests = [f"{names[k]} (SHA-256 {str(before.get(k))[:12]}, now {str(now[k])[:12]})" for k in changed]
            print_line(
                console,
                f"Note: since {self.name} was measured here, {' and '.join(digests)} changed, so it is measured "
                "again. If you did not change it, the file is damaged.",
            )
        return not changed

    def inputs(self) -> dict[str, Any]:
        """Return everything that the numbers depend on."""
        return {**self.model.entry_points(), **self._digests, **self.options.settings()}

    @property
    def _digests(self) -> dict[str, str]:
        return {
            "weights_sha256": self.weights_sha256,
            "data_sha256": self.data_sha256,
            "code_sha256": self.code_sha256,
        }

    def save(self, found: Flatness) -> None:
        content = found.to_json()
        content["settings"] |= self.model.entry_points()
        write_checked(self.path, {**content, "weights": str(self.weights), "inputs": self.inputs()})

    def prepare(self, progress: Progress) -> Prepared:
        model, options, budget = self.model, self.options, self.options.budget
        network, data = self._load()
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        objective = partial(options.objective, network, data, seed=budget.seed, progress=progress)
        normalized = None
        with entry_points.one_line_errors(f"{self.name}: the loss of {model.model} on {model.data}: "):
            if model.evaluate is not None:
                plain = objective(evaluate=model.function("evaluate"))
                plain.loss()
            else:
                loss = model.function("loss")
                plain = objective(loss=loss)
                if takes_logits(loss, lambda loss: objective(loss=loss)):
                    normalized = objective(loss=normalized_logits(loss))
        first = next((num_samples(batch) for batch, _ in Batches(data, options.batch_size)), 0)
        return Prepared(plain, normalized, replace(budget, m=min(budget.m, first)))

    def _load(self) -> tuple[nn.Module, Any]:
        """Return the network with its weights, and the data; both must be those of the digests."""
        network = self.model.network(self.options.budget.seed)
        if self.weights is not None:
            user_inputs.load_weights(network, self.weights)
        elif user_inputs.digest_of_model(network) != self.weights_sha256:
            raise ExperimentError(f"--model {self.model.model} gives another network each time: seed what it draws")
        data, sha256 = self.model.samples(self.options)
        if sha256 != self.data_sha256:
            raise ExperimentError(
                f"--data {self.model.data} gives other samples each time, and networks are compared on the same ones: "
                "switch augmentation off, and seed what it draws"
            )
        return network, data


def measure_user_model(model: UserModel, options: MeasuringOptions, console: Console) -> dict[str, Any]:
    """Measure each file of weights that is not measured yet; write and print the summary, and draw the figures.

    Returns the measures of each, as JSON has them.

    After an ExperimentError, finished measurements are kept.
    """
    summary = model.out / "summary.md"
    with RunFolder(model.out).locked():
        if summary.exists() and not summary.read_text(errors="replace").startswith(TITLE):
            raise ExperimentError(f"{summary} is not of steppe measure and would be lost: choose another --out")
        jobs = _jobs(model, options)
        measure_all([job for job in jobs if not job.is_measured(console)], options.jobs_at_once, console)
        found = {job.name: flatness for job in jobs if (flatness := read_flatness_file(job.path)[0]) is not None}
        table = FlatnessTable(model.model, model.setting, model.names, found, paired=bool(model.against))
        write_atomically(summary, table.markdown().encode())
        draw(table.groups(), model.out / "figures", f"{model.model} on {model.setting}")
        table.show(console)
        print_line(console, f"Written to {model.out}")
        measured = {name: flatness.to_json() for name, flatness in found.items()}
        return {"folder": str(model.out), "title": f"{model.model} on {model.setting}", "measured": measured}


def _jobs(model: UserModel, options: MeasuringOptions) -> list[UserModelJob]:
    """Make the jobs; every error in a file is found before the first one is measured."""
    network = model.network(options.budget.seed)
    paths = [*model.weights, *model.against]
    digests = [user_inputs.digest_of_file(path) for path in paths] or [user_inputs.digest_of_model(network)]
    for path in paths:
        user_inputs.load_weights(network, path)
    for i, sha256 in enumerate(digests):
        if sha256 in digests[:i]:
            raise ExperimentError(
                f"{paths[i]} is the same as {paths[digests.index(sha256)]}: a run that counts twice overstates the "
                "confidence of the verdict"
            )
    _, data_sha256 = model.samples(options)
    code_sha256 = model.digest_of_code()
    names = _names(paths) or [model.model.partition(":")[2]]
    files: list[Path | None] = [*paths] or [None]
    return [
        UserModelJob(name, path, sha256, data_sha256, code_sha256, model, options)
        for name, path, sha256 in zip(names, files, digests, strict=True)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each by its file, and by as many of its folders as make the names unique.

    >>> _names([Path("runs/sam/0.pt"), Path("runs/sgd/0.pt")])
    ['sam-0', 'sgd-0']
    """
    parts = [path.absolute().with_suffix("").parts[1:] for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.stem}-{path.suffix[1:]}-{i}" for i, path in enumerate(paths)]
