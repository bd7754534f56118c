"""Backbones are pretrained once, kept in the cache, and verified."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fine_tuning import OPTIONS, recipe, weights
from rich.console import Console
from tiny import CPU, batches_of, split, train_run

import steppe
from steppe.cli import main
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Run
from steppe.experiments.data import datasets as data
from steppe.experiments.data.batches import count
from steppe.experiments.data.datasets import Dataset, Split, normalize
from steppe.experiments.data.sampling import few_shot
from steppe.experiments.execution import pretraining as finetune
from steppe.experiments.execution.launch import InProcessExecutor
from steppe.experiments.models.backbones import Backbone, from_hub
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.report import page
from steppe.experiments.storage.records import parse_record
from steppe.experiments.storage.run_folder import CHECKPOINT
from steppe.experiments.training.stopping import Stop, Stopped
from stops import StopAfter


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, and tiny pictures in the place of the data sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "load", tiny_data)
    monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: folder.path)
    return tmp_path / "cache" / "steppe" / "backbones"


def tiny_data(name: str, data_dir: Path | None = None) -> Dataset:
    seed = 0 if name == "digits" else 7
    return Dataset(name, split(72, seed), split(50, seed + 1), "made for tests")


def words(out: Path, **fields: object) -> list[str]:
    given = {**OPTIONS, "out": out, **fields}
    return ["finetune", *(w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", *str(v).split()))]


def test_the_backbone_is_pretrained_once_and_taken_from_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "a")) == 0
    assert "Pretraining the backbone, once" in capsys.readouterr().out
    (kept,) = cache.iterdir()
    content = {p: p.read_bytes() for p in kept.rglob("*") if p.is_file()}
    # what was pretrained is what an ordinary run of that recipe gives, and the runs start from it
    pretraining = finetune.pretraining_recipe(recipe(momentum=0.9))
    train_run(Run(pretraining, MethodSpec.parse("sgd"), 0), tmp_path / "by hand", tiny_data("sample"))
    by_hand = Backbone(PreActResNet18(2, stem_stride=2), "head", "")
    by_hand.model.load_state_dict(weights(tmp_path / "by hand"))
    named = json.loads((tmp_path / "a" / "backbone.json").read_text())
    assert named["sha256"] == by_hand.digest()
    assert "2), 1 epochs on the sample of Fashion-MNIST" in named["source"]
    loaded: list[str] = []
    monkeypatch.setattr(data, "load", lambda name, data_dir=None: loaded.append(name) or tiny_data(name))
    assert main(words(tmp_path / "b")) == 0
    assert loaded == ["digits"]
    assert "Pretraining" not in capsys.readouterr().out
    assert {p: p.read_bytes() for p in kept.rglob("*") if p.is_file()} == content
    a, b = (weights(tmp_path / run / "runs" / "sam-seed0") for run in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "pretrained on a sample of Fashion-MNIST, 1 epoch) on digits" in (tmp_path / "b" / "summary.md").read_text()
    assert main(words(tmp_path / "c", pretrain_epochs=2)) == 0  # another configuration has another place
    assert len(list(cache.iterdir())) == 2


def test_a_truncated_backbone_raises_with_its_path(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "a", methods="sgd")) == 0
    (file,) = cache.glob(f"*/runs/*/{CHECKPOINT}")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(words(tmp_path / "b")) == 1
    assert f"the checkpoint {file} is damaged" in (said := capsys.readouterr().err)
    assert f"Delete {file}" in said
    file.unlink()
    assert main(words(tmp_path / "b", methods="sgd")) == 0
    a, b = (weights(tmp_path / run / "runs" / "sgd-seed0") for run in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_backbone_of_another_configuration_raises(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "a", methods="sgd")) == 0
    (kept,) = cache.iterdir()
    shutil.move(kept, tmp_path / "kept")
    assert main(words(tmp_path / "b", methods="sgd", pretrain_epochs=2)) == 0
    (other,) = cache.iterdir()
    shutil.copy(tmp_path / f"kept/runs/sgd-seed0/{CHECKPOINT}", other / "runs" / "sgd-seed0" / CHECKPOINT)
    capsys.readouterr()
    assert main(words(tmp_path / "c", methods="sgd", pretrain_epochs=2)) == 1
    assert "belongs to another run or another configuration" in capsys.readouterr().err


def test_a_folder_rejects_runs_from_another_backbone_of_the_same_name(
    cache: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForImageClassification

    shutil.copytree(saved, named := tmp_path / "model")
    given = {"backbone": f"hf:{named}", "methods": "sgd", "shots": 1, "image_size": 16}
    assert main(words(tmp_path / "run", **given)) == 0
    model = AutoModelForImageClassification.from_pretrained(named)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(named)
    capsys.readouterr()
    assert main(words(tmp_path / "run", seeds=2, **given)) == 1
    assert f"the runs in {tmp_path / 'run'} started from other weights" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "runs").iterdir()] == ["sgd-seed0"]
    (tmp_path / "run" / "backbone.json").write_text("{")
    assert main(words(tmp_path / "run", **given)) == 1
    assert "backbone.json is damaged" in capsys.readouterr().err


def test_stopped_pretraining_resumes_to_the_same_bits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(finetune.pretraining_recipe(recipe()), MethodSpec.parse("sgd"), 0)
    whole = tmp_path / "whole"
    train_run(run, whole, tiny_data("sample"))
    executor = InProcessExecutor(recipe(), CPU)
    real = InProcessExecutor.run

    def stopped(self: InProcessExecutor, jobs: Any, images: Dataset, control: Path, reporter: Any, stop: Stop) -> Any:
        return real(self, jobs, images, control, reporter, StopAfter(2))

    console = Console(quiet=True)
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(InProcessExecutor, "run", stopped)
        with pytest.raises(Stopped):
            finetune.with_backbone(tiny_data("digits"), executor, tmp_path / "run", console)
    (kept,) = cache.glob(f"*/runs/*/{CHECKPOINT}")
    assert not torch.load(kept, weights_only=True)["records"]
    start = finetune.with_backbone(tiny_data("digits"), executor, tmp_path / "run", console).backbone
    assert start is not None
    assert all(torch.equal(v, weights(whole)[k]) for k, v in start.model.state_dict().items())


def test_pretrain_on_auto_is_resolved_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "SYSTEM", tmp_path / "nowhere")
    monkeypatch.delenv("STEPPE_DATA", raising=False)
    console = Console(width=500)
    assert finetune.resolve_pretraining(recipe(pretrain_on="auto"), console).model.pretrain_on == "sample"
    assert "is not on this machine, so the backbone is pretrained on the 3,000 images" in capsys.readouterr().out
    assert (
        finetune.resolve_pretraining(recipe(pretrain_on="auto", data_dir=tmp_path), console).model.pretrain_on
        == "fashion-mnist"
    )
    folder = tmp_path / "steppe" / "fashion-mnist"
    folder.mkdir(parents=True)
    for file in (*data.fashion_mnist.TRAIN, *data.fashion_mnist.TEST):
        assert finetune.resolve_pretraining(recipe(pretrain_on="auto"), console).model.pretrain_on == "sample"
        (folder / f"{file.name}.gz").touch()
    assert finetune.resolve_pretraining(recipe(pretrain_on="auto"), console).model.pretrain_on == "fashion-mnist"
    assert (
        finetune.resolve_pretraining(recipe(backbone="none", pretrain_on="auto"), console).model.pretrain_on == "auto"
    )


def test_steppe_finetune_with_a_hugging_face_folder(cache: Path, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = words(out, backbone=f"hf:{saved}", epochs=2, shots=2, image_size=16, batch_size=10)
    assert main(given) == 0
    assert not cache.exists()
    last = [json.loads((out / f"runs/{m}-seed0/metrics.jsonl").read_text().splitlines()[-1]) for m in ("sgd", "sam")]
    assert [run["passes"] for run in last] == [1, 2]
    records = [parse_record(run) for run in last]
    backbone = from_hub(f"hf:{saved}", 10, 16)
    torch.manual_seed(0)
    network = backbone.network(freeze=False)
    optimizer = steppe.SAM(torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9), rho=0.05, model=network)
    drawn = few_shot(tiny_data("digits").train, 2, 0)
    assert (len(drawn), count(20, 10)) == (20, 2)
    for batch in batches_of(Split(drawn.images, drawn.labels), 10):
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(network(batch.inputs), batch.targets).backward()
        optimizer.step()
    ours = weights(out / "runs" / "sam-seed0")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    network.eval()
    with torch.no_grad():
        loss = F.cross_entropy(network(normalize(drawn.images)), drawn.labels)
    assert records[1]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
