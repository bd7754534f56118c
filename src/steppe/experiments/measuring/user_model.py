"""`steppe measure --model ...`: how flat the minimum of anybody's model is, and whether it is flatter than another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import cpus
from steppe.experiments.execution.pool import Tell, pooled
from steppe.experiments.figures.flatness import draw
from steppe.experiments.measuring.entry_points import called, check_name, named, reason
from steppe.experiments.measuring.measure import Sampling
from steppe.experiments.measuring.table import TITLE, Solutions
from steppe.experiments.measuring.user_data import digest_of_data, first_length, ready
from steppe.experiments.measuring.weights import digest, digest_of_model, load_weights
from steppe.experiments.storage.files import write_atomically, write_json
from steppe.experiments.storage.run_folder import RunFolder
from steppe.flatness import Budget, Flatness, Objective, measure, normalized_logits

__all__ = ["Anybody", "measure_anybody"]

_CROSS_ENTROPY = "torch.nn.functional:cross_entropy"


@dataclass(frozen=True)
class Anybody:
    """A model, its weights and data, by name."""

    model: str = ""
    """package.module:factory. It is called without arguments and gives the network; a network itself will do."""
    data: str = ""
    """package.module:factory, which gives the data: a tuple of tensors (inputs, targets), a Dataset of such pairs, of
    both of which --samples are drawn by --seed, or batches (a DataLoader, a list), which are measured on as they are.
    Called anew for each file, it must give the same each time: torch is seeded before. Augmentation must be off."""
    weights: tuple[Path, ...] = ()
    """Files of weights, a state dict each (torch.save, safetensors): several for several seeds of one method. Without
    any, the network is measured as it comes."""
    against: tuple[Path, ...] = ()
    """Weights of a reference, paired with --weights in their order: then the verdict is who is flatter."""
    names: tuple[str, str] = ("ours", "reference")
    """What the two are called."""
    loss: str = _CROSS_ENTROPY
    """package.module:function, (outputs, targets) -> mean loss of a batch."""
    evaluate: str | None = None
    """In its place, package.module:function, (model, batch) -> mean loss, for batches of any form."""
    out: Path = Path("flatness")
    """The folder for what is found: a JSON file for each file of weights, summary.md, figures."""

    def __post_init__(self) -> None:
        for option in ("model", "data", "loss", "evaluate"):
            if name := getattr(self, option):
                check_name(option, name)
        if bool(self.model) != bool(self.data):
            given, missing = ("model", "data") if self.model else ("data", "model")
            raise ValueError(
                f"{given}={getattr(self, given)!r}, and no --{missing}: flatness is that of a model on data"
            )
        if self.evaluate is not None and self.loss != _CROSS_ENTROPY:
            raise ValueError(f"loss={self.loss!r}, evaluate={self.evaluate!r}: one of them says what the loss is")
        if self.against and len(self.against) != len(self.weights):
            raise ValueError(
                f"against: {len(self.against)} files, and {len(self.weights)} are given with --weights: they are "
                "compared in pairs"
            )
        if self.names[0] == self.names[1] or not all(self.names):
            raise ValueError(f"names={' '.join(self.names)!r}: two different ones are needed to tell the two apart")


@dataclass(frozen=True)
class _Job:
    """A file of weights to measure, or the network as it comes."""

    name: str
    weights: Path | None
    weights_sha256: str
    data_sha256: str
    options: Anybody
    budget: Budget
    sampling: Sampling

    @property
    def path(self) -> Path:
        return self.options.out / f"{self.name}.json"

    def asked(self) -> dict[str, Any]:
        """What the numbers depend on."""
        named = {option: getattr(self.options, option) for option in ("model", "data", "loss", "evaluate")}
        digests = {"weights_sha256": self.weights_sha256, "data_sha256": self.data_sha256}
        return {**named, **digests, **asdict(self.sampling), **asdict(self.budget)}


def measure_anybody(
    options: Anybody, budget: Budget, sampling: Sampling, console: Console, *, processes: int | None = None
) -> None:
    """Measure each file of weights that is not measured yet; write down and show what they allow to say.

    With several files, `processes` of them at a time; by default as many as there are CPUs, and 1 on a GPU. Raises
    ExperimentError with one clear line; what is measured already is kept.
    """
    summary = options.out / "summary.md"
    with RunFolder(options.out).locked():
        if summary.exists() and not summary.read_text(errors="replace").startswith(TITLE):
            raise ExperimentError(f"{summary} is not of steppe measure and would be lost: choose another --out")
        jobs = _jobs(options, budget, sampling)
        todo = [job for job in jobs if _known(job) is None]
        most = processes or (1 if torch.cuda.is_available() else cpus.available())
        pooled(_measure, [(job.name, job) for job in todo], most, console)
        found = {job.name: flat for job in jobs if (flat := _known(job)) is not None}
        solutions = Solutions(options.model, _setting(options), options.names, found, paired=bool(options.against))
        write_atomically(summary, solutions.markdown().encode())
        draw(solutions.groups(), options.out / "figures", f"{options.model} on {_setting(options)}")
        solutions.show(console)
        console.print(f"Written to {options.out}", highlight=False, markup=False, soft_wrap=True)


def _setting(options: Anybody) -> str:
    return f"{options.data}, {options.evaluate or options.loss}"


def _jobs(options: Anybody, budget: Budget, sampling: Sampling) -> list[_Job]:
    """What there is to measure; all that can be wrong with a file is found before the first one is measured."""
    network = _network(options, budget.seed)
    paths = [*options.weights, *options.against]
    digests = [digest(path) for path in paths] or [digest_of_model(network)]
    for path in paths:
        load_weights(network, path)
    for i, sha in enumerate(digests):
        if sha in digests[:i]:
            raise ExperimentError(
                f"{paths[i]} is the same as {paths[digests.index(sha)]}: a run that counts twice makes a verdict "
                "surer than it is"
            )
    _, data = _data(options, budget, sampling)
    names = _names(paths) or [options.model.partition(":")[2]]
    given: list[Path | None] = [*paths] or [None]
    return [
        _Job(name, path, sha, data, options, budget, sampling)
        for name, path, sha in zip(names, given, digests, strict=True)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each by its file, and by so many of its folders that no two are called the same.

    >>> _names([Path("runs/sam/0.pt"), Path("runs/sgd/0.pt")])
    ['sam-0', 'sgd-0']
    """
    parts = [path.absolute().with_suffix("").parts[1:] for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.stem}-{path.suffix[1:]}-{i}" for i, path in enumerate(paths)]


def _network(options: Anybody, seed: int) -> nn.Module:
    found = named("model", options.model)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ExperimentError(
                f"--model {options.model} is {type(found).__name__}, neither a network nor a function that makes one"
            )
        with _seeded(seed):
            found = called("model", options.model, found)
    if not isinstance(found, nn.Module):
        raise ExperimentError(f"--model {options.model} gives {type(found).__name__}, and a torch.nn.Module is needed")
    return found


def _data(options: Anybody, budget: Budget, sampling: Sampling) -> tuple[Any, str]:
    """The data as they are measured on, and what tells them from others."""
    found = named("data", options.data)
    pairs = options.evaluate is None
    with _seeded(budget.seed):
        given = called("data", options.data, found) if callable(found) else found
        data = ready(given, options.data, sampling.samples, sampling.batch_size, budget.seed, pairs=pairs)
        try:
            return data, digest_of_data(data)
        except Exception as error:
            raise ExperimentError(f"--data {options.data}: walking through it raised {reason(error)}") from error


def _function(option: str, name: str) -> Callable[..., Tensor]:
    found = named(option, name)
    if isinstance(found, type) and issubclass(found, nn.Module):  # torch.nn:MSELoss
        found = called(option, name, found)
    if not callable(found):
        raise ExperimentError(f"--{option} {name} is {type(found).__name__}, and no function")
    return found  # type: ignore[no-any-return]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Make what is drawn inside the same each time, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _known(job: _Job) -> Flatness | None:
    """What was found of these weights and data, if it was with these settings."""
    if not job.path.exists():
        return None
    try:
        written = json.loads(job.path.read_text())
        found = Flatness.from_json(written)
        return found if written["asked"] == job.asked() else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExperimentError(
            f"{job.path} is damaged, of another version or not of steppe measure ({reason(error)}): delete it, or "
            "choose another folder with --out"
        ) from error


def _measure(job: _Job, tell: Tell) -> None:
    """Measure one, and write it down."""
    options, budget = job.options, job.budget
    network, data = _same(job)
    network.to("cuda" if torch.cuda.is_available() else "cpu")

    def objective(loss: Callable[..., Tensor] | None, evaluate: Callable[..., Tensor] | None = None) -> Objective:
        how: dict[str, Any] = {"batch_norm": job.sampling.batch_norm, "batch_size": job.sampling.batch_size}
        return Objective(network, data, loss=loss, evaluate=evaluate, **how, seed=budget.seed, progress=tell)

    normalized = None
    try:
        if options.evaluate is not None:
            plain = objective(None, _function("evaluate", options.evaluate))
            plain.loss()
        else:
            loss = _function("loss", options.loss)
            plain = objective(loss)
            if _classifies(objective, loss):
                normalized = objective(normalized_logits(loss))
    except ExperimentError:
        raise
    except Exception as error:  # it is their code that runs here
        raise ExperimentError(f"{job.name}: the loss of {options.model} on {options.data}: {reason(error)}") from error
    budget = replace(budget, m=min(budget.m, first_length(data, job.sampling.batch_size)))
    try:
        found = measure(plain, budget, normalized=normalized)
    except (FloatingPointError, ValueError, RuntimeError) as error:
        raise ExperimentError(f"{job.name}: {' '.join(str(error).split())}") from error
    written = found.to_json()
    written["settings"] |= {option: getattr(options, option) for option in ("model", "data", "loss", "evaluate")}
    write_json(job.path, {**written, "weights": str(job.weights), "asked": job.asked()})


def _same(job: _Job) -> tuple[nn.Module, Any]:
    """The network with its weights, and the data, that were looked at before anything was measured."""
    network = _network(job.options, job.budget.seed)
    if job.weights is not None:
        load_weights(network, job.weights)
    elif digest_of_model(network) != job.weights_sha256:
        raise ExperimentError(f"--model {job.options.model} gives another network each time: seed what it draws")
    data, sha256 = _data(job.options, job.budget, job.sampling)
    if sha256 != job.data_sha256:
        raise ExperimentError(
            f"--data {job.options.data} gives other samples each time, and what is compared must be measured on the "
            "same ones: switch augmentation off, and seed what it draws"
        )
    return network, data


def _classifies(objective: Callable[[Callable[..., Tensor]], Objective], loss: Callable[..., Tensor]) -> bool:
    """Whether what the loss sees are the logits of samples, (n, classes), of which a size can be taken out.

    Of two classes their difference alone matters, and at one size only its sign is left.
    """
    seen: list[tuple[Any, Any]] = []

    def spy(outputs: Any, targets: Any) -> Tensor:
        seen.append((outputs, targets))
        del seen[1:]
        return loss(outputs, targets)

    objective(spy).loss()
    outputs, targets = seen[0]
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.dim() == 2):
        return False
    return outputs.shape[1] > 2 and (not targets.is_floating_point() or loss is torch.nn.functional.cross_entropy)
