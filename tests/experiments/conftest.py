import json
from collections.abc import Generator
from pathlib import Path

import pytest
import tiny
import torch

from steppe.experiments.execution import cpus


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run each test of this folder, with its fixtures of all scopes, without work that no test asks for.

    It trains shallow networks in this process (to start another takes longer than a tiny run), waits for no disk, and
    for a second at most, not five, until a worker that reads data has ended.
    """
    if Path(__file__).parent not in item.path.parents:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpus, "available", lambda: 1)
        patch.setattr("os.fsync", lambda file: None)
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 1.0)
        tiny.shallow(patch)
        return (yield)


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
