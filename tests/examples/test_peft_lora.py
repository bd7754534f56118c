"""examples/peft_lora.py trains, logs the sharpness of the merged weights, and merges at w."""

import re

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from accelerate_state import fresh_accelerate_state  # noqa: F401
from example_files import EXAMPLES, run_example
from tiny_peft import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS


def test_page_on_fine_tuning_begins_with_the_example():
    page = (EXAMPLES.parent / "docs" / "finetuning.md").read_text("utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    assert (EXAMPLES / "peft_lora.py").read_text("utf-8").endswith(f'"""\n\n{code}')
    assert len(code.splitlines()) < 40


@pytest.mark.slow
def test_peft_lora_lowers_the_loss_and_merges(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the Trainer makes a folder
    example, text = run_example("peft_lora.py", capsys)
    first, last, sharpness = map(float, re.search(r"loss (\S+) -> (\S+), .* = (\S+) at the end", text).groups())
    assert last < 0.8 * first
    assert sharpness > 0
    report = example["trainer"].sam_report()
    assert report.length_in_rho == pytest.approx(1.0, rel=1e-3)
    names = {name for name, _ in example["merged"].named_parameters()}
    assert not any("lora" in name for name in names)
    with torch.no_grad():
        row = example["data"][0]["input_ids"][None]
        assert float(example["merged"].eval()(input_ids=row, labels=row).loss) < 0.8 * first
