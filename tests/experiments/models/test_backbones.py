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
from fine_tuning import without
from tiny import split
from torch import Tensor, nn

from steppe.cli import main
from steppe.experiments.data.datasets import normalize
from steppe.experiments.errors import ExperimentError
from steppe.experiments.models import backbones
from steppe.experiments.models.backbones import from_hub


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
        ({"rescale_factor": 1 / 127.5}, r"needs pixels scaled by 0\.00784"),
        ({"size": None}, r"does not state the size of its images: give it with --image-size"),
    ],
)
def test_missing_metadata_of_a_checkpoint_raises(
    saved: Path, tmp_path: Path, processor: dict[str, Any], meaning: str
) -> None:
    with pytest.raises(ExperimentError, match=meaning):
        from_hub(edited(saved, tmp_path / "copy", **processor), 10, None)


def test_missing_weights_of_a_checkpoint_raise(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, to := tmp_path / "copy")
    state = load_file(to / "model.safetensors")
    gone = next(name for name in state if "convolution.weight" in name)
    save_file({k: v for k, v in state.items() if k != gone}, to / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExperimentError, match=r"lacks 1 of the network's weights \(resnet"):
        from_hub(f"hf:{to}", 10, None)


def test_an_unknown_checkpoint_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["finetune", "--backbone", f"hf:{tmp_path / 'empty'}", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"the backbone hf:{tmp_path / 'empty'} could not be loaded (" in said
    assert "a file in this folder is missing or damaged" in said


def test_missing_transformers_is_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_unknown_timm_model_or_one_with_two_heads_raises(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ExperimentError, match=r"has no single last layer but \('head', 'head_dist'\)"):
        from_hub("timm:small", 10, None)


def test_missing_timm_is_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without("timm", monkeypatch)
    with pytest.raises(ExperimentError, match=r"timm is not installed.*pip install timm torchvision"):
        from_hub("timm:resnet18.a1_in1k", 10, None)


def test_images_that_a_network_rejects_are_found_before_any_run(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_code_of_a_checkpoint_is_not_run(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "hub"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ExperimentError, match="could not be loaded") as error:
        from_hub(f"hf:{folder}", 10, None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_in_a_pickle_of_objects_is_one_line(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "hub"))
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.1.weight": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(ExperimentError, match="could not be loaded") as error:
        from_hub(f"hf:{folder}", 10, None)
    assert "\n" not in str(error.value)
