"""A run from a backbone is a plain fine-tuning loop."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fine_tuning import dataset, pretrained, recipe, run_of, weights
from own_tasks import ON_ANY_MODEL
from tiny import train_run, training_of, untimed
from torch import Tensor, nn

import steppe
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data.batches import order
from steppe.experiments.data.datasets import MEAN, STD, Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.models.backbones import Backbone
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.training.stopping import Stopped
from stops import StopAfter


def test_methods_of_a_seed_share_images_and_head_and_seeds_differ() -> None:
    runs = list(recipe(shots=2, seeds=2).runs())
    runs = [training_of(run, dataset()) for run in runs]
    sgd, sam, other = runs[:3]
    assert sgd.samples_per_epoch == 20
    assert torch.equal(sgd.samples["train"].tensors[0], sam.samples["train"].tensors[0])
    assert not torch.equal(sgd.samples["train"].tensors[0], other.samples["train"].tensors[0])
    heads = [run.network.state_dict()["body.head.weight"] for run in runs]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], pretrained().model.state_dict()["head.weight"])
    assert torch.equal(other.network.state_dict()["body.stem.weight"], pretrained().model.state_dict()["stem.weight"])


def plain_loop(method: str, r: Recipe, seed: int, backbone: Backbone, images: Dataset) -> nn.Module:
    """Fine-tuning in a plain loop, for as many epochs as two standardized ones allow."""
    torch.manual_seed(seed)
    model = PreActResNet18(r.model.width, stem_stride=r.model.stem_stride)
    torch.manual_seed(seed)
    head = nn.Linear(model.head.in_features, 10)
    model.load_state_dict(backbone.model.state_dict())
    model.head = head
    model.train()
    if r.model.freeze:
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
def test_a_run_equals_a_plain_fine_tuning_loop(method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    r = recipe(norm="batch", **fields)
    train_run(Run(r, MethodSpec.parse(method), 3), tmp_path, dataset())
    ours = {k.removeprefix("body."): v for k, v in weights(tmp_path).items()}
    theirs = plain_loop(method, r, 3, pretrained(), dataset()).state_dict()
    before = pretrained().model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        if not name.startswith("head."):
            assert torch.equal(ours[name], before[name]) == bool(fields.get("freeze")), name


def test_every_method_protects_the_network_that_it_trains() -> None:
    for method in (name for name in ON_ANY_MODEL if not METHODS[name].plain):
        run = training_of(run_of(method, methods=("sgd", method)), dataset())
        assert getattr(run.optimizer, "model", run.network) is run.network, method


def test_sam_differs_from_sgd_and_its_second_pass_is_counted(tmp_path: Path) -> None:
    ends = {m: train_run(run_of(m), tmp_path / m, dataset())[-1] for m in ("sgd", "sam")}
    assert (ends["sgd"].passes, ends["sam"].passes) == (1, 2)
    assert ends["sgd"].gradient_evaluations == ends["sam"].gradient_evaluations == 144
    assert not torch.equal(weights(tmp_path / "sgd")["body.head.weight"], weights(tmp_path / "sam")["body.head.weight"])


@pytest.mark.parametrize("fields", [{}, {"freeze": True, "shots": 3, "head_lr": 0.1}], ids=str)
def test_a_stopped_fine_tuning_resumes_to_the_same_bits(fields: dict[str, Any], tmp_path: Path) -> None:
    run = run_of("sam", **fields)
    whole = train_run(run, tmp_path / "whole", dataset())
    with pytest.raises(Stopped):
        train_run(run, tmp_path / "parts", dataset(), stop=StopAfter(2))
    torch.manual_seed(99)
    assert untimed(train_run(run, tmp_path / "parts", dataset())) == untimed(whole)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_run_from_other_initial_weights_does_not_resume(tmp_path: Path) -> None:
    run = run_of("sgd")
    train_run(run, tmp_path, dataset())
    with pytest.raises(ExperimentError, match="belongs to another run or another configuration"):
        train_run(run, tmp_path, dataset(pretrained(6)))


def test_a_missing_backbone_raises() -> None:
    with pytest.raises(RuntimeError, match=r"backbone=own, but the data has None"):
        training_of(run_of("sgd"), dataclasses.replace(dataset(), backbone=None))


def test_backbone_none_is_the_network_of_compare() -> None:
    r = recipe(backbone="none", pretrain_on="auto")
    network = training_of(Run(r, MethodSpec.parse("sgd"), 4), dataclasses.replace(dataset(), backbone=None)).network
    torch.manual_seed(4)
    assert torch.equal(network.state_dict()["head.weight"], PreActResNet18(2, stem_stride=2).head.weight)


@pytest.mark.parametrize(
    ("method", "fields", "meaning"),
    [
        ("sam_on", {"freeze": True}, "perturbs weights that --freeze keeps"),
        ("bsam", {"head_lr": 0.1}, "one learning rate of its own"),
    ],
)
def test_an_option_that_would_be_ignored_raises(method: str, fields: dict[str, Any], meaning: str) -> None:
    with pytest.raises(ExperimentError, match=meaning):
        training_of(run_of(method, methods=("sgd", method), **fields), dataset())
