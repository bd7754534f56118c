"""`steppe finetune`: what runs start from, and that a run from there is a plain fine-tuning loop."""

import builtins
import dataclasses
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import CPU, split, untimed
from torch import Tensor, nn

import steppe
from steppe.cli import main
from steppe.experiments.analysis.summary import setting
from steppe.experiments.commands import parse
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data import datasets as data
from steppe.experiments.data import digits
from steppe.experiments.data.batches import batches, count, order
from steppe.experiments.data.datasets import MEAN, STD, Dataset, Split, load, normalize
from steppe.experiments.data.few_shot import few_shot
from steppe.experiments.errors import DataError, ExperimentError
from steppe.experiments.execution import pretraining as finetune
from steppe.experiments.execution.executor import InProcess
from steppe.experiments.figures import curves as figures
from steppe.experiments.models import backbones
from steppe.experiments.models.backbones import Backbone, from_hub
from steppe.experiments.models.preact_resnet import preact_resnet18
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import CHECKPOINT, RunFolder
from steppe.experiments.training.run import Training, train
from steppe.experiments.training.stopping import Stop, Stopped
from stops import StopAfter

OPTIONS = {
    "width": 2, "batch_size": 16, "epochs": 2, "eval_every": 2, "seeds": 1, "device": "cpu", "threads": 1, "lr": 0.02,
    "pretrain_epochs": 1, "pretrain_on": "sample",
}  # fmt: skip


def recipe(**fields: object) -> Recipe:
    return RECIPES["finetune"][0].replace(**(OPTIONS | fields))


def pretrained(seed: int = 5) -> Backbone:
    """A backbone whose weights and running statistics are all unlike new ones."""
    torch.manual_seed(seed)
    model = preact_resnet18(2, stem_stride=2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor) if "running" in name else 0.1 * torch.randn_like(tensor))
    return Backbone(model, "head", "made for tests")


def dataset(start: Backbone | None = None) -> Dataset:
    return Dataset("digits", split(72, 0), split(50, 1), "made for tests", pretrained() if start is None else start)


@pytest.fixture(scope="module")
def whole() -> Dataset:
    return load("digits")


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / CHECKPOINT, weights_only=True)["model"])


# The data.


def test_digits_are_scikit_learns_with_one_in_three_of_each_class_for_testing(whole: Dataset) -> None:
    from sklearn.datasets import load_digits  # the truth, read by another path

    loaded = load_digits()
    assert (len(whole.train), len(whole.test)) == (1201, 596)
    images = torch.cat([whole.train.images, whole.test.images])
    assert (images.dtype, images.shape[1:]) == (torch.uint8, (1, 28, 28))
    for label in range(10):
        of_class = torch.from_numpy(loaded.images[loaded.target == label])
        test = whole.test.images[whole.test.labels == label]
        wanted = F.interpolate(of_class[2::3].unsqueeze(1), (28, 28), mode="bilinear") * (255 / 16)
        assert (test.double() - wanted).abs().max() <= 0.5
        assert len(whole.train.labels[whole.train.labels == label]) == len(of_class) - len(of_class) // 3
    assert torch.bincount(images.flatten(1).max(1).values.long())[:128].sum() == 0  # every image is scaled to 0..255


def test_digits_that_are_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"digits of this scikit-learn are not those .* Install scikit-learn again"):
        load("digits")


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(module: str, *args: Any, **kwargs: Any) -> types.ModuleType:
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_a_missing_scikit_learn_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without("sklearn", monkeypatch)
    assert main(["finetune", "--backbone", "none", "--out", str(tmp_path / "run")]) == 1
    assert "pip install 'steppe[finetune]'" in capsys.readouterr().err


def test_few_shots_are_stratified_drawn_by_the_seed_and_nested(whole: Dataset) -> None:
    seven, three, other = (few_shot(whole.train, shots, seed) for shots, seed in ((7, 0), (3, 0), (7, 1)))
    assert torch.equal(torch.bincount(seven.labels), torch.full((10,), 7))
    keys = [{image.numpy().tobytes() for image in s.images} for s in (seven, three, other, whole.test, whole.train)]
    assert len(keys[0]) == 70
    assert keys[1] < keys[0]
    assert keys[0] <= keys[4]
    assert not keys[0] & keys[3]
    assert keys[0] != keys[2]
    again = few_shot(whole.train, 7, 0)
    assert torch.equal(again.images, seven.images)
    assert torch.equal(again.labels, seven.labels)
    for image, label in zip(seven.images, seven.labels, strict=True):  # each keeps its own label
        at = (whole.train.images == image).flatten(1).all(1).nonzero()[0]
        assert whole.train.labels[at] == label
    with pytest.raises(ExperimentError, match=r"shots=900: class 0 has 119 training images.*--shots 119 or fewer"):
        few_shot(whole.train, 900, 0)


def test_contenders_of_a_seed_share_images_and_head_and_seeds_do_not() -> None:
    runs = list(recipe(shots=2, seeds=2).runs())
    runs = [Training(run, dataset(), CPU) for run in runs]
    sgd, sam, other = runs[:3]
    assert sgd.images == 20
    assert torch.equal(sgd.data.train.images, sam.data.train.images)
    assert not torch.equal(sgd.data.train.images, other.data.train.images)
    heads = [run.network.state_dict()["body.head.weight"] for run in runs]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], pretrained().model.state_dict()["head.weight"])
    assert torch.equal(other.network.state_dict()["body.stem.weight"], pretrained().model.state_dict()["stem.weight"])


# The run.


def plain_loop(method: str, r: Recipe, seed: int, backbone: Backbone, images: Dataset) -> nn.Module:
    """Fine-tuning as anybody would write it, for as many epochs as two standardized ones pay for."""
    torch.manual_seed(seed)
    model = preact_resnet18(r.model.width, stem_stride=r.model.stem_stride)
    torch.manual_seed(seed)
    head = nn.Linear(model.head.in_features, 10)
    model.load_state_dict(backbone.model.state_dict())
    model.head = head
    model.train()
    if r.freeze:
        model.eval()
        for p in model.parameters():
            p.requires_grad_(p is head.weight or p is head.bias)
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")]
    groups = [{"params": rest}] if rest else []
    groups += [{"params": list(head.parameters()), "lr": r.training.head_lr or r.training.lr}]
    optimizer: Any = torch.optim.SGD(groups, lr=r.training.lr, momentum=r.base_momentum)
    if method == "sam":
        optimizer = steppe.SAM(optimizer, rho=r.training.rho, model=model)
    for epoch in range(r.comparison.epochs // (2 if method == "sam" else 1)):
        chosen = order(len(images.train), seed, epoch)
        for start, end in ((0, 14), (14, 28), (28, 43), (43, 57), (57, 72)):
            x, y = (t[chosen[start:end]] for t in (images.train.images, images.train.labels))
            x = (x.float() / 255 - MEAN) / STD

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    return model


@pytest.mark.parametrize("method", ["sgd", "sam"])
@pytest.mark.parametrize("fields", [{}, {"head_lr": 0.1}, {"freeze": True}], ids=str)
def test_a_run_is_a_plain_loop(method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    r = recipe(norm="batch", **fields)
    train(Run(r, MethodSpec.parse(method), 3), tmp_path, dataset(), CPU)
    ours = {k.removeprefix("body."): v for k, v in weights(tmp_path).items()}
    theirs = plain_loop(method, r, 3, pretrained(), dataset()).state_dict()
    before = pretrained().model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        if not name.startswith("head."):
            assert torch.equal(ours[name], before[name]) == bool(fields.get("freeze")), name


def test_every_contender_protects_the_network_that_it_trains() -> None:
    for method in (name for name, method in METHODS.items() if not method.plain):
        run = Training(Run(recipe(methods=("sgd", method)), MethodSpec.parse(method), 0), dataset(), CPU)
        assert getattr(run.optimizer, "model", run.network) is run.network, method


def test_sam_is_not_sgd_and_a_climb_is_counted(tmp_path: Path) -> None:
    ends = {m: train(Run(recipe(), MethodSpec.parse(m), 0), tmp_path / m, dataset(), CPU)[-1] for m in ("sgd", "sam")}
    assert (ends["sgd"].passes, ends["sam"].passes) == (1, 2)
    assert ends["sgd"].gradient_evaluations == ends["sam"].gradient_evaluations == 144
    assert not torch.equal(weights(tmp_path / "sgd")["body.head.weight"], weights(tmp_path / "sam")["body.head.weight"])


@pytest.mark.parametrize("fields", [{}, {"freeze": True, "shots": 3, "head_lr": 0.1}], ids=str)
def test_stopped_in_the_middle_it_goes_on_to_the_same_bits(fields: dict[str, Any], tmp_path: Path) -> None:
    run = Run(recipe(**fields), MethodSpec.parse("sam"), 0)
    whole = train(run, tmp_path / "whole", dataset(), CPU)
    with pytest.raises(Stopped):
        train(run, tmp_path / "parts", dataset(), CPU, stop=StopAfter(2))
    torch.manual_seed(99)
    assert untimed(train(run, tmp_path / "parts", dataset(), CPU)) == untimed(whole)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_run_that_started_from_other_weights_is_not_gone_on_with(tmp_path: Path) -> None:
    run = Run(recipe(), MethodSpec.parse("sgd"), 0)
    train(run, tmp_path, dataset(), CPU)
    with pytest.raises(ExperimentError, match="belongs to another run or another configuration"):
        train(run, tmp_path, dataset(pretrained(6)), CPU)


def test_a_run_without_its_backbone_is_a_mistake_and_not_a_run_from_scratch() -> None:
    with pytest.raises(RuntimeError, match=r"backbone=own, but the data came with None"):
        Training(Run(recipe(), MethodSpec.parse("sgd"), 0), dataclasses.replace(dataset(), backbone=None), CPU)


def test_from_scratch_is_compares_own_network() -> None:
    r = recipe(backbone="none", pretrain_on="auto")
    network = Training(Run(r, MethodSpec.parse("sgd"), 4), dataclasses.replace(dataset(), backbone=None), CPU).network
    torch.manual_seed(4)
    assert torch.equal(network.state_dict()["head.weight"], preact_resnet18(2, stem_stride=2).head.weight)


@pytest.mark.parametrize(
    ("method", "fields", "meaning"),
    [
        ("sam_on", {"freeze": True}, "climbs with weights that --freeze keeps"),
        ("bsam", {"head_lr": 0.1}, "one learning rate of its own"),
    ],
)
def test_what_would_be_ignored_is_refused(method: str, fields: dict[str, Any], meaning: str) -> None:
    with pytest.raises(ExperimentError, match=meaning):
        Training(Run(recipe(methods=("sgd", method), **fields), MethodSpec.parse(method), 0), dataset(), CPU)


# The own backbone.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, and tiny pictures in the place of the data sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "load", tiny_data)
    monkeypatch.setattr(figures, "draw", lambda recipe, results, folder: [])
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
    train(Run(pretraining, MethodSpec.parse("sgd"), 0), tmp_path / "by hand", tiny_data("sample"), CPU)
    by_hand = Backbone(preact_resnet18(2, stem_stride=2), "head", "")
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


def test_a_truncated_backbone_is_refused_by_its_name(
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


def test_a_backbone_of_another_configuration_in_its_place_is_refused(
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


def test_a_folder_takes_no_runs_from_another_backbone_of_the_same_name(
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


def test_stopped_pretraining_goes_on_to_the_same_bits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(finetune.pretraining_recipe(recipe()), MethodSpec.parse("sgd"), 0)
    whole = tmp_path / "whole"
    train(run, whole, tiny_data("sample"), CPU)
    executor = InProcess(recipe(), CPU)
    real = InProcess.run

    def stopped(self: InProcess, jobs: Any, images: Dataset, control: Path, reporter: Any, stop: Stop) -> Any:
        return real(self, jobs, images, control, reporter, StopAfter(2))

    console = Console(quiet=True)
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "run", stopped)
        with pytest.raises(Stopped):
            finetune.with_backbone(tiny_data("digits"), executor, tmp_path / "run", console)
    (kept,) = cache.glob(f"*/runs/*/{CHECKPOINT}")
    assert not torch.load(kept, weights_only=True)["records"]
    start = finetune.with_backbone(tiny_data("digits"), executor, tmp_path / "run", console).backbone
    assert start is not None
    assert all(torch.equal(v, weights(whole)[k]) for k, v in start.model.state_dict().items())


def test_what_is_pretrained_on_is_settled_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "SYSTEM", tmp_path / "nowhere")
    monkeypatch.delenv("STEPPE_DATA", raising=False)
    console = Console(width=500)
    assert finetune.resolve_pretraining(recipe(pretrain_on="auto"), console).model.pretrain_on == "sample"
    assert "is not on this machine, so the backbone is pretrained on the 3,000 images" in capsys.readouterr().out
    assert finetune.resolve_pretraining(recipe(pretrain_on="auto", data_dir=tmp_path), console).model.pretrain_on == "fashion-mnist"
    folder = tmp_path / "steppe" / "fashion-mnist"
    folder.mkdir(parents=True)
    for file in (*data.fashion_mnist.TRAIN, *data.fashion_mnist.TEST):
        assert finetune.resolve_pretraining(recipe(pretrain_on="auto"), console).model.pretrain_on == "sample"
        (folder / f"{file.name}.gz").touch()
    assert finetune.resolve_pretraining(recipe(pretrain_on="auto"), console).model.pretrain_on == "fashion-mnist"
    assert finetune.resolve_pretraining(recipe(backbone="none", pretrain_on="auto"), console).model.pretrain_on == "auto"


# The recipe.


def test_the_verb_is_the_recipe_finetune() -> None:
    short, long = parse(["finetune", "--shots", "5"]), parse(["compare", "finetune", "--shots", "5"])
    assert short.recipe == long.recipe == RECIPES["finetune"][0].replace(shots=5)  # type: ignore[union-attr]
    assert parse(["tune", "finetune"]).recipe == RECIPES["finetune"][0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "meaning"),
    [
        ({"backbone": "owm"}, r"backbone: 'owm' is unknown; did you mean 'own'"),
        ({"backbone": "hf:"}, r"backbone: 'hf:' is unknown"),
        ({"dataset": "sample"}, r"dataset=sample: the own backbone .* has seen these images"),
        ({"backbone": "none", "freeze": True}, r"freeze=True: without a backbone all layers are new"),
        ({"backbone": "none", "head_lr": 0.1}, r"head_lr=0.1: without a backbone"),
        ({"head_lr": 0.0}, r"head_lr=0.0: .* above 0"),
        ({"image_size": 32}, r"image_size=32: images are resized for timm and hf"),
        ({"shots": 0}, r"shots=0: training images of each class"),
        ({"backbone": "none", "data_dir": Path("d")}, r"data_dir=d: nothing here is read from the full Fashion-MNIST"),
    ],
)
def test_a_wrong_value_is_named_with_its_meaning(fields: dict[str, Any], meaning: str) -> None:
    with pytest.raises(ValueError, match=meaning):
        recipe(**fields)


def test_a_run_folder_refuses_another_number_of_shots(tmp_path: Path) -> None:
    demo = RECIPES["demo"][0]
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.claim(demo, 1)
    with pytest.raises(ExperimentError, match=r"holds another configuration.*: shots was None and is 3\. Take"):
        folder.claim(demo.replace(shots=3), 1)


def test_the_title_says_where_runs_start() -> None:
    assert setting(recipe(shots=1, freeze=True, head_lr=0.1, pretrain_on="fashion-mnist", pretrain_epochs=3)) == (
        "PreAct ResNet-18 (width 2, pretrained on Fashion-MNIST, 3 epochs, linear probe) on digits, 1 image a class: "
        "SGD, lr 0.02 (head 0.1), momentum 0.9, batch 16, rho 0.05"
    )
    assert setting(recipe(backbone="hf:a/b", image_size=64)).startswith("hf:a/b (pretrained, 64 px) on digits: SGD")


# Checkpoints of others.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image model of Hugging Face with three classes, randomly initialized, in a local folder."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(1)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
    )
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    ResNetForImageClassification(config).save_pretrained(folder)
    processor = {
        "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255,
        "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 32}, "crop_pct": 0.9,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_hugging_face_folder_becomes_a_backbone(saved: Path) -> None:
    from transformers import ResNetForImageClassification

    backbone = from_hub(f"hf:{saved}", 10, None)
    assert (backbone.head, backbone.size) == ("classifier.1", 32)
    torch.manual_seed(0)
    network = backbone.network(freeze=False).eval()
    torch.manual_seed(0)
    head = nn.Linear(8, 10)
    images = split(4, 3).images
    by_hand = ResNetForImageClassification.from_pretrained(saved).eval()
    x = F.interpolate(images.float() / 255, (32, 32), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    x = (x - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = head(by_hand.resnet(x).pooler_output.flatten(1))
        torch.testing.assert_close(network(normalize(images)), wanted, rtol=1e-5, atol=1e-5)
    assert from_hub(f"hf:{saved}", 10, 48).size == 48
    assert from_hub(f"hf:{saved}", 10, None).digest() == backbone.digest()  # the new head is no part of it
    assert from_hub(f"hf:{saved}", 10, 48).digest() != backbone.digest()


def test_steppe_finetune_with_a_hugging_face_folder(cache: Path, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = words(out, backbone=f"hf:{saved}", epochs=2, shots=2, image_size=16, batch_size=10)
    assert main(given) == 0
    assert not cache.exists()
    last = [json.loads((out / f"runs/{m}-seed0/metrics.jsonl").read_text().splitlines()[-1]) for m in ("sgd", "sam")]
    assert [run["passes"] for run in last] == [1, 2]
    records = [Record(**run) for run in last]
    backbone = from_hub(f"hf:{saved}", 10, 16)
    torch.manual_seed(0)
    network = backbone.network(freeze=False)
    optimizer = steppe.SAM(torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9), rho=0.05, model=network)
    drawn = few_shot(tiny_data("digits").train, 2, 0)
    assert (len(drawn), count(20, 10)) == (20, 2)
    for batch in batches(Split(drawn.images, drawn.labels), 10, order(20, 0, 0), CPU):
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(network(batch.images), batch.labels).backward()
        optimizer.step()
    ours = weights(out / "runs" / "sam-seed0")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    network.eval()
    with torch.no_grad():
        loss = F.cross_entropy(network(normalize(drawn.images)), drawn.labels)
    assert records[1].train_loss == pytest.approx(loss.item(), rel=1e-5)


def edited(saved: Path, to: Path, **processor: object) -> str:
    shutil.copytree(saved, to)
    path = to / "preprocessor_config.json"
    values = json.loads(path.read_text()) | processor
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return f"hf:{to}"


@pytest.mark.parametrize(
    ("processor", "meaning"),
    [
        ({"image_mean": None}, r"has no image_mean and image_std"),
        ({"rescale_factor": 1 / 127.5}, r"wants its pixels scaled by 0\.00784"),
        ({"size": None}, r"does not say the size of its images: give it with --image-size"),
    ],
)
def test_what_is_not_known_of_a_checkpoint_is_not_guessed(
    saved: Path, tmp_path: Path, processor: dict[str, Any], meaning: str
) -> None:
    with pytest.raises(ExperimentError, match=meaning):
        from_hub(edited(saved, tmp_path / "copy", **processor), 10, None)


def test_weights_that_a_checkpoint_lacks_are_not_left_random(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, to := tmp_path / "copy")
    state = load_file(to / "model.safetensors")
    gone = next(name for name in state if "convolution.weight" in name)
    save_file({k: v for k, v in state.items() if k != gone}, to / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExperimentError, match=r"lacks 1 of the network's weights \(resnet"):
        from_hub(f"hf:{to}", 10, None)


def test_a_name_that_cannot_be_loaded_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["finetune", "--backbone", f"hf:{tmp_path / 'empty'}", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"the backbone hf:{tmp_path / 'empty'} could not be loaded (" in said
    assert "check the name and the network connection" in said


def test_a_missing_transformers_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without("transformers", monkeypatch)
    with pytest.raises(ExperimentError, match=r"transformers is not installed.*pip install 'steppe\[transformers\]'"):
        from_hub("hf:some/model", 10, None)


class Small(nn.Module):
    """In the manner of timm: logits as a tensor, and a `pretrained_cfg`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, classes)
        self.pretrained_cfg: dict[str, Any] = {
            "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 20, 20), "classifier": "fc",
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 20, 20)
        return self.fc(self.conv(x).relu().mean((2, 3)))


def stand_in(monkeypatch: pytest.MonkeyPatch, create: Callable[..., nn.Module]) -> None:
    """timm cannot be imported without torchvision, which has no working build here."""
    module = types.ModuleType("timm")
    module.create_model = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)


def test_a_timm_model_becomes_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool, int]] = []
    torch.manual_seed(2)
    model = Small(10)

    def create(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        asked.append((name, pretrained, num_classes))
        return model

    stand_in(monkeypatch, create)
    backbone = from_hub("timm:small", 10, None)
    assert asked == [("small", True, 10)]
    torch.manual_seed(0)
    network = backbone.network(freeze=True)
    torch.manual_seed(0)
    head = nn.Linear(4, 10)
    images = split(4, 3).images
    x = F.interpolate(images.float() / 255, (20, 20), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    wanted = head(model.conv((x - 0.5) / 0.25).relu().mean((2, 3)))
    torch.testing.assert_close(network(normalize(images)), wanted, rtol=1e-5, atol=1e-6)
    assert [n for n, p in network.named_parameters() if p.requires_grad] == ["body.fc.weight", "body.fc.bias"]


def test_a_timm_model_that_is_not_there_or_has_two_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str, **_: Any) -> nn.Module:
        raise RuntimeError(f"Unknown model ({name})")

    stand_in(monkeypatch, unknown)
    with pytest.raises(ExperimentError, match=r"timm:small could not be loaded \(Unknown model \(small\)\): check"):
        from_hub("timm:small", 10, None)

    def distilled(name: str, **_: Any) -> nn.Module:
        model = Small(10)
        model.pretrained_cfg["classifier"] = ("head", "head_dist")
        return model

    stand_in(monkeypatch, distilled)
    with pytest.raises(ExperimentError, match=r"has not one last layer but \('head', 'head_dist'\)"):
        from_hub("timm:small", 10, None)


def test_a_missing_timm_or_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without("timm", monkeypatch)
    with pytest.raises(ExperimentError, match=r"timm is not installed.*pip install timm torchvision"):
        from_hub("timm:resnet18.a1_in1k", 10, None)


def test_images_that_a_network_does_not_take_are_found_before_any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(Small):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 20:
                raise ValueError("Input image size (30*30) doesn't match model (20*20).")
            return super().forward(x)

    stand_in(monkeypatch, lambda name, **_: Fixed(10))
    with pytest.raises(ExperimentError, match=r"does not take images of 30 x 30 pixels .*leave --image-size out"):
        from_hub("timm:small", 10, 30)
    before = torch.get_rng_state()
    assert backbones.from_hub("timm:small", 10, None).size == 20
    assert not torch.equal(before, torch.zeros_like(before))
