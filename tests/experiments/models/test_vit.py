"""VisionTransformer is the papers' model: counted, and compared with a slow forward that loops over heads."""

import math

import pytest
import torch
from torch import Tensor

from steppe.experiments.models.networks import new_network
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.models.vit import VisionTransformer


def model() -> VisionTransformer:
    torch.manual_seed(0)
    made = VisionTransformer(32, depth=2, in_channels=2, image_size=8, num_classes=3).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.2 * torch.randn_like(weight))  # so that no bias and no norm is the identity
    return made


def slow_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    rows = [(row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt() for row in x]
    return torch.stack(rows) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def slow_linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def slow_attention(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    queries, keys, values = slow_linear(x, weights, f"{name}.queries_keys_values").chunk(3, dim=1)
    heads = []
    for first in range(0, x.shape[1], 16):
        one = slice(first, first + 16)
        scores = torch.tensor([[q @ k / 4 for k in keys[:, one]] for q in queries[:, one]], dtype=x.dtype)
        shares = scores.exp() / scores.exp().sum(1, keepdim=True)
        heads.append(shares @ values[:, one])
    return slow_linear(torch.cat(heads, 1), weights, f"{name}.output")


def slow_logits(image: Tensor, weights: dict[str, Tensor], depth: int) -> Tensor:
    corners = [(i, j) for i in range(0, image.shape[1], 4) for j in range(0, image.shape[2], 4)]
    patches = torch.stack([image[:, i : i + 4, j : j + 4].flatten() for i, j in corners])
    x = patches @ weights["patches.weight"].flatten(1).T + weights["patches.bias"] + weights["positions"]
    for number in range(depth):
        block = f"blocks.{number}"
        x = x + slow_attention(slow_norm(x, weights, f"{block}.attention_norm"), weights, block)
        hidden = slow_linear(slow_norm(x, weights, f"{block}.mlp_norm"), weights, f"{block}.hidden")
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + slow_linear(gelu, weights, f"{block}.down")
    return slow_linear(slow_norm(x, weights, "norm").mean(0, keepdim=True), weights, "head")[0]


def test_forward_is_that_of_the_papers() -> None:
    network, images = model(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    expected = torch.stack([slow_logits(image, weights, 2) for image in images])
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


def test_weights_are_as_many_as_by_hand() -> None:
    width, patches, classes = 64, 49, 10
    block = 3 * width * (width + 1) + width * (width + 1) + 2 * 2 * width * width + 3 * width + 2 * 2 * width
    expected = 17 * width + patches * width + 4 * block + 2 * width + classes * (width + 1)
    assert sum(weight.numel() for weight in VisionTransformer(width).parameters()) == expected


def test_it_has_second_derivatives_for_measures_of_flatness() -> None:
    network = model()
    weights = list(network.parameters())
    loss = network(torch.randn(2, 2, 8, 8, dtype=torch.float64)).square().sum()
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)
    assert all(bool(g.isfinite().all()) for g in second)


@pytest.mark.parametrize("width", [0, 8, 24])
def test_width_is_a_multiple_of_a_head(width: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        VisionTransformer(width)


def test_images_are_whole_patches() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        VisionTransformer(image_size=30)


def test_networks_are_made_by_their_names() -> None:
    assert isinstance(new_network("vit", 16, stem_stride=2, norm="batch"), VisionTransformer)
    resnet = new_network("preact-resnet-18", 3, stem_stride=1, norm="group")
    assert isinstance(resnet, PreActResNet18)
    assert (resnet.stem.out_channels, resnet.stem.stride) == (3, (1, 1))
