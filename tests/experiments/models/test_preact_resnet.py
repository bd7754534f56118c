"""PreActResNet18 is the paper's model: counted, and compared with a slow forward written from the paper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import whole
from torch import Tensor, nn

from steppe.experiments.models.preact_resnet import Norm, PreActResNet18


@pytest.fixture(autouse=True)
def whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the network of the paper, and not the shallow one of other tests."""
    whole(monkeypatch)


def slow_batch_norm(x: Tensor, weights: dict[str, Tensor], name: str, training: bool) -> Tensor:
    if training:
        mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
    else:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    shape = (1, -1, 1, 1)
    run = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return run * weights[f"{name}.weight"].view(shape) + weights[f"{name}.bias"].view(shape)


def slow_group_norm(x: Tensor, weights: dict[str, Tensor], name: str, groups: int) -> Tensor:
    parts = [
        (part - part.mean(dim=(1, 2, 3), keepdim=True))
        / (part.var(dim=(1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        for part in x.chunk(groups, dim=1)
    ]
    shape = (1, -1, 1, 1)
    return torch.cat(parts, dim=1) * weights[f"{name}.weight"].view(shape) + weights[f"{name}.bias"].view(shape)


def slow_forward(
    images: Tensor, weights: dict[str, Tensor], norm: Callable[[Tensor, str], Tensor], stem_stride: int
) -> Tensor:
    """Equations (1) and (2) of the paper with f = identity, one layer a line, on the bare weights."""
    x = F.conv2d(images, weights["stem.weight"], stride=stem_stride, padding=1)
    for block, stride in enumerate([1, 1, 2, 1, 2, 1, 2, 1]):
        at = f"blocks.{block}"
        a = norm(x, f"{at}.norm1").clamp(min=0)
        h = x if stride == 1 else F.conv2d(a, weights[f"{at}.shortcut.weight"], stride=stride)
        f = F.conv2d(a, weights[f"{at}.conv1.weight"], stride=stride, padding=1)
        f = norm(f, f"{at}.norm2").clamp(min=0)
        f = F.conv2d(f, weights[f"{at}.conv2.weight"], padding=1)
        x = h + f
    x = norm(x, "norm").clamp(min=0)
    x = x.flatten(2).sum(dim=2) / (x.shape[2] * x.shape[3])
    return x @ weights["head.weight"].T + weights["head.bias"]


def scrambled(model: PreActResNet18) -> PreActResNet18:
    """Give every weight and running statistic an unusual value, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.dim() == 1 or "running" in name):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.double()


def images_and_model(norm: Norm, stem_stride: int, width: int = 6) -> tuple[Tensor, PreActResNet18]:
    torch.manual_seed(1)
    model = PreActResNet18(width, in_channels=2, num_classes=5, stem_stride=stem_stride, norm=norm)
    return torch.randn(3, 2, 28, 28, dtype=torch.float64), scrambled(model)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parameter_count(norm: Norm) -> None:
    assert sum(p.numel() for p in PreActResNet18(norm=norm).parameters()) == 11_171_018
    assert sum(p.numel() for p in PreActResNet18(16, norm=norm).parameters()) == 700_730


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_the_slow_forward(stem_stride: int, training: bool) -> None:
    images, model = images_and_model("batch", stem_stride)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = slow_forward(images, weights, lambda x, at: slow_batch_norm(x, weights, at, training), stem_stride)
    torch.testing.assert_close(model.train(training)(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("width", "groups"), [(6, [6, 6, 8, 8]), (5, [5, 5, 5, 8]), (8, [8, 8, 8, 8])])
def test_group_norm_agrees_with_the_slow_forward(width: int, groups: list[int]) -> None:
    images, model = images_and_model("group", 2, width)
    weights = dict(model.state_dict())
    of_channels = {width * 2**stage: count for stage, count in enumerate(groups)}
    expected = slow_forward(images, weights, lambda x, at: slow_group_norm(x, weights, at, of_channels[x.shape[1]]), 2)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_weight_matters_and_gets_a_gradient(norm: Norm) -> None:
    images, model = images_and_model(norm, 2)
    model.eval()
    before = model(images)
    before.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
            assert not torch.allclose(model(images), before), name
        before = model(images)


@pytest.mark.parametrize(("stem_stride", "sizes"), [(1, [28, 28, 14, 14, 7, 7, 4, 4]), (2, [14, 14, 7, 7, 4, 4, 2, 2])])
def test_shapes_through_the_stages(stem_stride: int, sizes: list[int]) -> None:
    model = PreActResNet18(4, stem_stride=stem_stride)
    shapes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    channels = [4, 4, 8, 8, 16, 16, 32, 32]
    assert shapes == [(3, c, size, size) for c, size in zip(channels, sizes, strict=True)]
    assert [block.shortcut is not None for block in model.blocks] == [False, False, True, False] + [
        True,
        False,
    ] * 2


def test_defaults_are_fashion_mnist() -> None:
    model = PreActResNet18()
    assert model.stem.weight.shape == (64, 1, 3, 3)
    assert model.stem.bias is None
    assert model.head.weight.shape == (10, 512)
    assert model.eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_norm_chooses_the_layers() -> None:
    def count(model: nn.Module, kind: type[nn.Module]) -> int:
        return sum(isinstance(module, kind) for module in model.modules())

    batch, group = PreActResNet18(4), PreActResNet18(4, norm="group")
    assert (count(batch, nn.BatchNorm2d), count(batch, nn.GroupNorm)) == (17, 0)
    assert (count(group, nn.BatchNorm2d), count(group, nn.GroupNorm)) == (0, 17)


def test_group_norm_treats_each_image_by_itself_and_batch_norm_does_not() -> None:
    for norm, alone in (("group", True), ("batch", False)):
        images, model = images_and_model(norm, 2)  # type: ignore[arg-type]
        assert torch.allclose(model(images)[:1], model(images[:1]), rtol=1e-9, atol=1e-9) == alone


def test_initialization_is_torchs_own() -> None:
    torch.manual_seed(0)
    model = PreActResNet18(4)
    torch.manual_seed(0)
    assert torch.equal(model.stem.weight, nn.Conv2d(1, 4, 3, bias=False).weight)


def test_input_is_unchanged() -> None:
    images = torch.randn(2, 1, 28, 28)
    before = images.clone()
    PreActResNet18(4)(images).sum().backward()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["width", "in_channels", "num_classes", "stem_stride"])
def test_sizes_below_one_raise(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        PreActResNet18(**{name: 0})  # type: ignore[arg-type]


def test_unknown_norm_raises() -> None:
    with pytest.raises(ValueError, match=r"norm is 'layer'.*'batch', 'group'"):
        PreActResNet18(norm="layer")  # type: ignore[arg-type]
