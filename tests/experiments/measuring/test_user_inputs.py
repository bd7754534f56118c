import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from user_code import go, measured_names, net, user_folder, weights

from steppe.experiments.entry_points import load_entry_point
from steppe.experiments.errors import ExperimentError
from steppe.experiments.measuring.user_inputs import load_weights

__all__ = ["measured_names", "user_folder"]  # fixtures


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
def test_state_dict_is_found_under_the_usual_names(wrap: Any) -> None:
    torch.save(wrap(net(1).state_dict()), "w.pt")
    loaded = net(2)
    load_weights(loaded, Path("w.pt"))
    for tensor, expected in zip(loaded.state_dict().values(), net(1).state_dict().values(), strict=True):
        assert torch.equal(tensor, expected)


def test_prefixes_of_the_network_itself_are_kept() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    torch.save(Wrapped().state_dict(), "w.pt")
    load_weights(Wrapped(), Path("w.pt"))


def test_safetensors_with_tied_weights_are_loaded(user_folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    sys.path.insert(0, str(user_folder))
    tied, other = (load_entry_point("model", "user_module:Tied")() for _ in range(2))
    safetensors.save_model(tied, "w.safetensors")
    load_weights(other, Path("w.safetensors"))
    assert torch.equal(other.inner.weight, tied.inner.weight)


def test_missing_safetensors_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("w.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ExperimentError, match=r"w\.safetensors is read by the package safetensors, which is not installed: pip install"
    ):
        load_weights(net(1), Path("w.safetensors"))


class CustomObject:
    """An object that torch can only read by running code."""


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
        (lambda s: CustomObject(), "more than tensors and plain values, and would run code.*save the state dict alone"),
    ],
)
def test_weights_of_another_network_raise(content: Any, message: str) -> None:
    torch.save(content(dict(net(1).state_dict())), "w.pt")
    network = net(2)
    with pytest.raises(ExperimentError, match=rf"^w\.pt .*{message}"):
        load_weights(network, Path("w.pt"))


def test_damaged_file_is_found_before_anything_is_measured(measured_names: list[str]) -> None:
    one, other = weights(1, 2)
    content = bytearray(other.read_bytes())
    content[content.index(net(2)[0].weight.detach().numpy().tobytes())] ^= (
        1  # torch reads the file, with another weight
    )
    assert not torch.equal(torch.load(io.BytesIO(content))["0.weight"], net(2)[0].weight)
    for damaged in (bytes(content), b"", b"text", other.read_bytes()[:-100]):
        other.write_bytes(damaged)
        with pytest.raises(ExperimentError, match=r"^w2\.pt is damaged, or no file of weights"):
            go(weights=(one, other))
    with pytest.raises(ExperimentError, match="missing.pt cannot be read: No such file"):
        go(weights=(one, Path("missing.pt")))
    assert measured_names == []
