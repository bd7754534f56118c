import json
from pathlib import Path

import pytest
import torch

from steppe.experiments.execution import cpus


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process, unless a test asks for several: to start one takes longer than a tiny run."""
    monkeypatch.setattr(cpus, "available", lambda: 1)


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
