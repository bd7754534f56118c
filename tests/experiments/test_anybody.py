"""`steppe measure --model`: anybody's network, weights and data, and what is said where one of them will not do."""

import io
import json
import math
import pickle
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from steppe.experiments.errors import ExperimentError
from steppe.experiments.figures import flatness as flatness_figures
from steppe.experiments.measuring import entry_points as named
from steppe.experiments.measuring import user_model as anybody
from steppe.experiments.measuring.measure import Sampling
from steppe.experiments.measuring.table import Solutions
from steppe.experiments.measuring.user_model import Anybody, measure_anybody
from steppe.experiments.measuring.weights import load_weights
from steppe.flatness import FAMILIES, Budget, Objective

EFFORT = Budget(
    m=4, steps=1, restarts=1, pairs=2, top=2, tol=0.5, probes=2, density_probes=1, density_steps=3, points=0
)

CODE = '''
"""A user's own module."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

calls = 0

def net():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

ready_made = net()

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight
    def forward(self, x):
        return self.outer(self.inner(x))

def nothing():
    return "no network"

def broken():
    raise KeyError("first line\\nsecond line")

def x_y(n=30):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)

def pair():
    return x_y()

def drawn():
    return torch.randn(30, 4), torch.randint(3, (30,))

class Restless:
    """Its own generator goes on from call to call."""
    g = torch.Generator()
    def __call__(self):
        return torch.randn(30, 4, generator=self.g), torch.randint(3, (30,), generator=self.g)

restless = Restless()

def uneven():
    return torch.randn(30, 4), torch.zeros(29)

def dataset():
    return TensorDataset(*x_y())

class Dicts(Dataset):
    def __len__(self):
        return 30
    def __getitem__(self, i):
        x, y = x_y()
        return {"x": x[i], "y": y[i]}

def dicts():
    return Dicts()

class Ragged(Dataset):
    def __len__(self):
        return 9
    def __getitem__(self, i):
        return torch.ones(i + 1), 0

def ragged():
    return Ragged()

class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

def stream():
    return Stream()

def loader():
    return DataLoader(TensorDataset(*x_y()), batch_size=7, shuffle=True)

class Fading(list):
    """Whose sixth pass is another one."""
    passes = 0
    def __iter__(self):
        self.passes += 1
        return iter([(x + (self.passes > 5), y) for x, y in list.__iter__(self)])

def fading():
    return Fading([x_y()])

def once():
    return iter([x_y()])

def a_dict():
    return {"x": 1}

def a_number():
    return 3

def not_a_number():
    x, y = x_y()
    return x * float("nan"), y

def real_targets():
    return x_y()[0], torch.ones(30, 3)

def in_two_classes():
    return x_y()[0], torch.zeros(30, dtype=torch.int64)

def two_classes():
    return nn.Linear(4, 2)

def of_dicts(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])

def each(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g

def once_differentiable():
    class Net(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))
    return Net(4, 3)
'''


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with somebody's code and weights, which is the current one."""
    (tmp_path / "theirs.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "careless.py").write_text("import not_installed_anywhere")
    (tmp_path / "failing.py").write_text("None.strip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(anybody, "draw", lambda groups, folder, told: [])  # it takes longer than all else
    yield tmp_path
    for module in ("theirs", "careless", "failing"):
        sys.modules.pop(module, None)


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    made[1].running_mean.uniform_()
    return made


def weights(*seeds: int) -> tuple[Path, ...]:
    for seed in seeds:
        torch.save(net(seed).state_dict(), f"w{seed}.pt")
    return tuple(Path(f"w{seed}.pt") for seed in seeds)


def go(model: str = "net", data: str = "pair", *, samples: int = 30, width: int = 80, **options: Any) -> str:
    """Measure with what their module has; give back what was said."""
    for option in ("evaluate", "loss"):
        if option in options and ":" not in options[option]:
            options[option] = f"theirs:{options[option]}"
    console = Console(file=io.StringIO(), width=width)
    asked = Anybody(f"theirs:{model}", f"theirs:{data}", **options)
    measure_anybody(asked, EFFORT, Sampling(samples=samples, batch_size=16), console, processes=1)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def written(name: str) -> dict[str, Any]:
    return json.loads(Path("flatness", f"{name}.json").read_text())  # type: ignore[no-any-return]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(30, 4, generator=g), torch.randint(3, (30,), generator=g)


def loss(seed: int) -> float:
    return float(Objective(net(seed), data(), loss=F.cross_entropy).loss())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is measured."""
    names: list[str] = []
    measure = anybody._measure

    def of(job: Any, tell: Any) -> None:
        names.append(job.name)
        measure(job, tell)

    monkeypatch.setattr(anybody, "_measure", of)
    return names


# What is measured


def test_a_file_of_weights_is_measured_with_all_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anybody, "draw", flatness_figures.draw)
    said = go(weights=weights(1))
    found = written("w1")
    assert set(found["measures"]) == {name for family in FAMILIES.values() for name in family.measures}
    assert found["measures"]["loss"]["value"] == pytest.approx(loss(1), rel=1e-6)
    assert found["settings"].items() >= {"samples": 30, "model": "theirs:net", "data": "theirs:pair", "m": 4}.items()
    assert max(map(len, said.splitlines())) <= 80
    summary = Path("flatness", "summary.md").read_text()
    value = f"{found['measures']['gradient_norm']['value']:.4g}"
    assert f"| gradient norm | {value} |  |" in summary
    trace = found["measures"]["trace"]
    assert f"| Hessian trace | {trace['value']:.4g} ± {trace['error']:.2g} |" in summary
    assert any(line.split()[:3] == ["gradient", "norm", value] for line in said.splitlines())
    assert Path("flatness", "figures", "spectra.png").exists()


def test_without_weights_the_network_is_measured_as_it_comes() -> None:
    go()
    first = written("net")["measures"]
    torch.rand(1)
    go(out=Path("again"))  # a factory that draws its weights draws the same ones
    assert json.loads(Path("again", "net.json").read_text())["measures"] == first
    go("ready_made")
    assert written("ready_made")["measures"]["loss"]["value"] != first["loss"]["value"]


@pytest.mark.parametrize("given", ["dataset", "loader"])
def test_data_in_other_forms_are_the_same_data(given: str) -> None:
    go(data=given, weights=weights(1))
    found = written("w1")
    assert found["settings"]["samples"] == 30
    assert found["measures"]["loss"]["value"] == pytest.approx(loss(1), rel=1e-6)


def test_samples_are_drawn_by_the_seed_from_tensors_and_from_a_dataset_alike() -> None:
    (w,) = weights(1)
    go(weights=(w,), samples=10)
    first = written("w1")
    go(weights=(w,), samples=10, data="dataset")
    assert first["settings"]["samples"] == 10
    assert written("w1")["measures"]["loss"]["value"] == pytest.approx(first["measures"]["loss"]["value"], rel=1e-6)
    chosen = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:10]
    x, y = data()
    there = Objective(net(1), (x[chosen], y[chosen]), loss=F.cross_entropy)
    assert first["measures"]["loss"]["value"] == pytest.approx(float(there.loss()), rel=1e-6)


def test_a_part_is_no_larger_than_a_batch() -> None:
    console = Console(quiet=True)
    options = Anybody("theirs:net", "theirs:loader", weights=weights(1))
    measure_anybody(options, Budget(**{**vars(EFFORT), "m": 64}), Sampling(), console)
    assert written("w1")["settings"]["m"] == 7


def test_an_evaluation_of_ones_own_and_batches_of_any_form() -> None:
    go(data="dicts", evaluate="of_dicts", weights=weights(1))
    found = written("w1")
    assert found["measures"]["loss"]["value"] == pytest.approx(loss(1), rel=1e-6)
    assert not any(name.startswith("normalized") for name in found["measures"])


@pytest.mark.parametrize(
    ("model", "given", "by", "there"),
    [
        ("net", "pair", "torch.nn.functional:cross_entropy", True),
        ("net", "pair", "torch.nn:CrossEntropyLoss", True),
        ("net", "real_targets", "torch.nn.functional:cross_entropy", True),
        ("net", "real_targets", "torch.nn:MSELoss", False),
        ("two_classes", "in_two_classes", "torch.nn.functional:cross_entropy", False),
    ],
)
def test_normalized_logits_are_for_classes(
    model: str, given: str, by: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def measure(objective: Objective, budget: Budget, *, normalized: Objective | None) -> None:
        seen.append(normalized is not None)
        raise ValueError("enough")

    monkeypatch.setattr(anybody, "measure", measure)
    with pytest.raises(ExperimentError, match="enough"):
        go(model, given, loss=by)
    assert seen == [there]


# What is not measured again


def test_what_is_known_of_the_same_weights_data_and_settings_is_kept(asked: list[str]) -> None:
    files = weights(1, 2)
    go(weights=files)
    go(weights=files)
    assert asked == ["w1", "w2"]
    torch.save(net(7).state_dict(), files[0])
    go(weights=files)
    assert asked == ["w1", "w2", "w1"]
    go(weights=files, samples=20)
    assert asked[3:] == ["w1", "w2"]
    Path("theirs.py").write_text(CODE.replace("manual_seed(5)", "manual_seed(6)"))
    del sys.modules["theirs"]
    go(weights=files, samples=20)
    assert asked[5:] == ["w1", "w2"]


def test_what_is_not_of_steppe_is_not_written_over() -> None:
    Path("flatness").mkdir()
    Path("flatness", "summary.md").write_text("# My thesis")
    with pytest.raises(ExperimentError, match=r"summary\.md is not of steppe measure and would be lost.*--out"):
        go()
    assert Path("flatness", "summary.md").read_text() == "# My thesis"
    for content in ('{"mine": 1}', "{", "[]"):
        Path("other").mkdir(exist_ok=True)
        Path("other", "net.json").write_text(content)
        with pytest.raises(ExperimentError, match=r"net\.json is damaged, of another version or not of steppe"):
            go(out=Path("other"))
        assert Path("other", "net.json").read_text() == content


# Against a reference


def test_against_a_reference_there_is_a_verdict_in_pairs() -> None:
    files = weights(1, 2, 3, 4)
    said = go(weights=files[:2], against=files[2:], names=("SAM", "SGD"), width=200)
    summary = Path("flatness", "summary.md").read_text()
    values = [written(f"w{seed}")["measures"]["trace"]["value"] for seed in (1, 2, 3, 4)]
    difference = (values[0] - values[2] + values[1] - values[3]) / 2
    (row,) = [line for line in said.splitlines() if line.startswith("Hessian trace")]
    assert f" {difference:+.3g} ± " in row
    assert "SAM's minima against SGD's, 2 paired runs: " in said
    for text in (said, summary):
        assert "Flatter does not mean better" in text
    assert "## SAM against SGD" in summary
    assert all(f"## w{seed}\n" in summary for seed in (1, 2, 3, 4))


def test_groups_have_the_reference_first_and_single_files_their_names() -> None:
    found = {name: name for name in "abcd"}
    assert Solutions("m", "s", ("SAM", "SGD"), found, True).groups() == {"SGD": ["c", "d"], "SAM": ["a", "b"]}  # type: ignore[arg-type]
    assert Solutions("m", "s", ("SAM", "SGD"), found, False).groups() == {"SAM": list("abcd")}  # type: ignore[arg-type]
    assert Solutions("m", "s", ("SAM", "SGD"), {"a": "a"}, False).groups() == {"a": ["a"]}  # type: ignore[arg-type, dict-item]


def test_several_files_are_told_of_by_mean_and_standard_deviation() -> None:
    said = go(weights=weights(1, 2))
    a, b = (written(f"w{seed}")["measures"]["loss"]["value"] for seed in (1, 2))
    (line,) = [line.split() for line in said.splitlines() if line.startswith("loss ")]
    assert line[1:4] == [f"{(a + b) / 2:.4g}", "±", f"{abs(a - b) / math.sqrt(2):.2g}"]
    assert "2 files" in " ".join(line)


def test_files_of_one_name_are_told_apart_by_their_folders() -> None:
    for folder, seed in (("sam", 1), ("sgd", 2)):
        Path(folder).mkdir()
        torch.save(net(seed).state_dict(), Path(folder, "best.pt"))
    go(weights=(Path("sam/best.pt"),), against=(Path("sgd/best.pt"),))
    assert written("sam-best")["measures"]["loss"]["value"] == pytest.approx(loss(1), rel=1e-6)
    assert written("sgd-best")["measures"]["loss"]["value"] == pytest.approx(loss(2), rel=1e-6)


def test_a_run_does_not_count_twice() -> None:
    one, other = weights(1, 2)
    Path("copy.pt").write_bytes(one.read_bytes())
    for given in ({"weights": (one, Path("copy.pt"))}, {"weights": (one, other), "against": (Path("copy.pt"), one)}):
        with pytest.raises(ExperimentError, match=r"is the same as w1\.pt: a run that counts twice"):
            go(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "theirs.py:net"}, "model='theirs.py:net': write package.module:name"),
        ({"data": "theirs"}, "data='theirs': write package.module:name"),
        ({"evaluate": "a:b", "loss": "c:d"}, "one of them says what the loss is"),
        ({"against": (Path("a"),)}, "1 files, and 0 are given with --weights.*pairs"),
        ({"names": ("a", "a")}, "two different ones"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anybody(**{"model": "a:b", "data": "a:b", **options})


# Files of weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": state},
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    ],
)
def test_a_state_dict_is_found_in_the_usual_places(wrap: Any) -> None:
    torch.save(wrap(net(1).state_dict()), "w.pt")
    loaded = net(2)
    load_weights(loaded, Path("w.pt"))
    for tensor, expected in zip(loaded.state_dict().values(), net(1).state_dict().values(), strict=True):
        assert torch.equal(tensor, expected)


def test_a_network_that_has_such_names_itself_keeps_them() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    torch.save(Wrapped().state_dict(), "w.pt")
    load_weights(Wrapped(), Path("w.pt"))


def test_safetensors_and_tied_weights(here: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    sys.path.insert(0, str(here))
    tied, other = (named.named("model", "theirs:Tied")() for _ in range(2))
    safetensors.save_model(tied, "w.safetensors")
    load_weights(other, Path("w.safetensors"))
    assert torch.equal(other.inner.weight, tied.inner.weight)


def test_safetensors_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("w.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ExperimentError, match=r"w\.safetensors is read by the package safetensors: pip install"):
        load_weights(net(1), Path("w.safetensors"))


class Mine:
    """What torch does not read without running its code."""


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda s: without(s, "0.weight", "3.bias"),
            "not of this Sequential: it comes without 0.weight, 3.bias. .*random",
        ),
        (lambda s: {**s, "9.weight": s["0.bias"]}, "it comes with an unexpected 9.weight"),
        (lambda s: without(s) | {f"head.{i}": s["0.bias"] for i in range(5)}, "head.0, head.1, head.2 and 2 more"),
        (lambda s: {f"net.{k}": v for k, v in s.items()}, "without 0.weight.* and 5 more and with an unexpected net.0"),
        (
            lambda s: {**s, "0.weight": torch.ones(9, 4)},
            r"other shapes than Sequential: 0.weight is \(9, 4\) and \(5, 4\)",
        ),
        (lambda s: {"epoch": 3, "best": 0.5}, "holds dict, with epoch, best, and no state dict.*state_dict, model_"),
        (lambda s: [1, 2], "holds list, not a dictionary, and no state dict"),
        (lambda s: {**s, "3.bias": "text"}, "cannot be loaded into Sequential"),
        (lambda s: Mine(), "more than tensors and plain values, and would run code.*save the state dict alone"),
    ],
)
def test_weights_of_another_network(content: Any, message: str) -> None:
    torch.save(content(dict(net(1).state_dict())), "w.pt")
    network = net(2)
    with pytest.raises(ExperimentError, match=rf"^w\.pt .*{message}"):
        load_weights(network, Path("w.pt"))


def test_a_damaged_file_is_found_before_anything_is_measured(asked: list[str]) -> None:
    one, other = weights(1, 2)
    content = bytearray(other.read_bytes())
    content[content.index(net(2)[0].weight.detach().numpy().tobytes())] ^= 1  # torch reads it, as another weight
    assert not torch.equal(torch.load(io.BytesIO(content))["0.weight"], net(2)[0].weight)
    for damaged in (bytes(content), b"", b"text", other.read_bytes()[:-100]):
        other.write_bytes(damaged)
        with pytest.raises(ExperimentError, match=r"^w2\.pt is damaged, or no file of weights"):
            go(weights=(one, other))
    with pytest.raises(ExperimentError, match="missing.pt cannot be read: No such file"):
        go(weights=(one, Path("missing.pt")))
    assert asked == []


# Errors in what is named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere:net"}, r"--model nowhere:net: there is no module nowhere: it is looked for in"),
        ({"model": "theirs.deeper:net"}, "--model theirs.deeper:net: there is no module theirs.deeper"),
        ({"model": "careless:net"}, "there is no module not_installed_anywhere, which careless imports"),
        ({"model": "failing:net"}, "importing failing raised AttributeError: 'NoneType'"),
        ({"model": "theirs:missing"}, r"theirs \(.*theirs.py\) has no missing"),
        ({"model": "theirs:calls"}, "theirs:calls is int, neither a network nor a function"),
        ({"model": "theirs:nothing"}, "gives str, and a torch.nn.Module is needed"),
        ({"model": "theirs:broken"}, "calling it raised KeyError: 'first line"),
        ({"data": "theirs:broken"}, "--data theirs:broken: calling it raised KeyError"),
        ({"data": "theirs:restless"}, "gives other samples each time.*augmentation"),
        (
            {"data": "theirs:fading"},
            "^net: data: one pass saw 30 samples, and the next one 30, or others.*augmentation",
        ),
        ({"data": "theirs:uneven"}, "tensors of 30 and 29 entries"),
        ({"data": "theirs:dicts"}, "an item is dict, and a loss takes .inputs, targets.: say with --evaluate"),
        ({"data": "theirs:ragged"}, "cannot be put into one batch .RuntimeError.*collate_fn"),
        ({"data": "theirs:stream"}, "one after the other: put a DataLoader around"),
        ({"data": "theirs:once"}, "gives list_iterator, which can be walked through once only"),
        ({"data": "theirs:a_dict"}, "gives dict: give a tuple of tensors"),
        ({"data": "theirs:a_number"}, "gives int: give a tuple of tensors"),
        ({"data": "theirs:not_a_number"}, "^net: The loss at the weights themselves is nan"),
        ({"data": "theirs:real_targets", "loss": "theirs:missing"}, "--loss theirs:missing: theirs .* has no missing"),
        ({"loss": "theirs:calls"}, "--loss theirs:calls is int, and no function"),
        ({"loss": "theirs:each"}, r"net: the loss of theirs:net on theirs:pair: .*shape .16,., and its mean is needed"),
        (
            {"model": "theirs:Tied", "data": "theirs:real_targets"},
            "^Tied: the loss of theirs:Tied on .*: RuntimeError: ",
        ),
        ({"model": "theirs:once_differentiable"}, "^once_differentiable: An operation .* has no second derivative"),
    ],
)
def test_one_clear_line(options: dict[str, Any], message: str) -> None:
    asked = Anybody(**{"model": "theirs:net", "data": "theirs:pair", **options})
    with pytest.raises(ExperimentError, match=message) as raised:
        measure_anybody(asked, EFFORT, Sampling(batch_size=16), Console(quiet=True))
    assert "\n" not in str(raised.value)


def test_the_cause_is_kept() -> None:
    with pytest.raises(ExperimentError) as raised:
        go("broken")
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_factory_that_draws_by_torch_draws_the_same() -> None:
    state = torch.get_rng_state()
    go(data="drawn", weights=weights(1, 2))
    torch.set_rng_state(state)
    first = written("w1")["asked"]["data_sha256"]
    torch.rand(5)
    go(data="drawn", weights=weights(3), out=Path("again"))
    assert json.loads(Path("again", "w3.json").read_text())["asked"]["data_sha256"] == first


def test_a_job_can_be_sent_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    files = weights(1)
    go(weights=files)
    measure, found = anybody._measure, written("w1")
    monkeypatch.setattr(anybody, "_measure", lambda job, tell: measure(pickle.loads(pickle.dumps(job)), tell))
    go(weights=files, out=Path("again"))
    again = json.loads(Path("again", "w1.json").read_text())
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    monkeypatch.undo()
    assert pickle.loads(pickle.dumps(anybody._measure)) is anybody._measure
