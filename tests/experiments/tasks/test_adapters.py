"""The built-in tasks on adapters: what is trained, wrong labels, the second task, and their recipe."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import command_line
from torch import nn

from steppe.experiments.config.presets import RECIPES
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks import adapters, text
from steppe.experiments.tasks.task import Task

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a tiny encoder, randomly initialized, and a tokenizer of letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(1)
    package = tmp_path_factory.mktemp("packages") / "encoder"
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    package.mkdir()
    (package / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(package / "model")
    BertTokenizerFast(str(package / "vocab.txt")).save_pretrained(package / "model")
    return package


@pytest.fixture
def tiny(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = text._folder
    monkeypatch.setattr(text, "_folder", lambda name: encoder if name == text._ENCODER else folder(name))
    monkeypatch.setattr(text, "_NEEDS", {})
    monkeypatch.setattr(text, "TESTS", 4)
    text._tokenizer.cache_clear()
    yield
    text._tokenizer.cache_clear()


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.usefixtures("tiny")
def test_adapters_and_the_head_are_trained_or_everything() -> None:
    lora, full = adapters.lora().model(), adapters.full().model()
    assert all(".lora_" in name or name.startswith("head.") for name in trained(lora))
    adapted = {name.split(".lora_")[0] for name in trained(lora) if ".lora_" in name}
    linear = {name for name, module in full.encoder.named_modules() if isinstance(module, nn.Linear)}
    assert {name.removeprefix("encoder.") for name in adapted} == linear
    assert trained(full) == {name for name, _ in full.named_parameters()}
    assert full.encoder.embeddings.word_embeddings.weight.requires_grad


def labels(task: Task, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, _, targets = task.train(seed)
    return inputs, targets


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_in_five_labels_are_wrong_in_the_training_data_alone(kind: str) -> None:
    noisy, clean = getattr(adapters, f"{kind}_wrong_labels")(), getattr(adapters, kind)()
    inputs, targets = labels(noisy, 3)
    right = torch.arange(4).repeat_interleave(adapters.MORE_SHOTS)
    assert len(inputs) == len(right)
    assert (targets != right).sum() == round(adapters.WRONG * len(right))
    assert labels(clean, 3)[1].tolist() == sorted(labels(clean, 3)[1].tolist())
    assert all(map(torch.equal, noisy.test, clean.test))
    assert noisy.test[2].tolist() == sorted(noisy.test[2].tolist())


@pytest.mark.usefixtures("tiny")
def test_second_task_has_sentences_of_as_many_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(adapters.OTHER_LIBRARIES) == len(text.LIBRARIES)
    assert not adapters.OTHER_LIBRARIES.keys() & text.LIBRARIES.keys()
    monkeypatch.setattr(adapters, "encoded", lambda sentences, tokens: sentences)
    second = adapters.other_libraries()
    train, test = ([line for of_class in split for line in of_class] for split in (second.train, second.test))
    assert (len(train), len(test)) == (4 * adapters._OTHER_SHOTS, 4 * adapters._OTHER_TESTS)
    assert not set(train) & set(test)
    assert not any(name in line.lower() for name in adapters.OTHER_LIBRARIES for line in train + test)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_recipe_compares_its_methods_and_measures_what_is_forgotten(tmp_path: Path) -> None:
    words = ["--epochs", "2", "--eval-every", "2", "--seeds", "2", "--then-epochs", "1", "--device", "cpu"]
    assert command_line(["compare", "adapters", *words, "--out", str(tmp_path / "run")], draws=False) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    compared = [str(spec) for spec in RECIPES["adapters"][0].comparison.methods]
    assert [row["method"] for row in summary["rows"] if "@" not in row["method"]] == compared
    assert {verdict["method"] for verdict in summary["forgetting"]} == set(compared[1:])
    assert all("test_accuracy after the second task" in row for row in summary["rows"] if "@" not in row["method"])


def test_missing_peft_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(text, "_NEEDS", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ExperimentError, match=r"peft is not installed.*pip install 'steppe\[peft\]'"):
        adapters.lora()
