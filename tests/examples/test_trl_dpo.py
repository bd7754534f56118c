"""examples/trl_dpo.py raises the margin of the rewards, and logs the sharpness of the merged weights."""

import re

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("trl", reason="needs TRL: pip install trl")

from accelerate_state import fresh_accelerate_state  # noqa: F401
from example_files import run_example
from tiny_trl import without_cache_or_hub  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL about its own future


@pytest.mark.slow
def test_trl_dpo_raises_the_margin_of_the_rewards(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the trainer makes a folder
    example, text = run_example("trl_dpo.py", capsys)
    found = re.findall(r"(\S+): (\S+) -> (\S+)\n", text)
    printed = {name: (float(first), float(last)) for name, first, last in found}
    assert printed["loss"][1] < printed["loss"][0]
    assert printed["rewards/margins"][1] > 10 * abs(printed["rewards/margins"][0])
    assert printed["sharpness"][1] > 0
    report = example["trainer"].sam_report()
    assert report.length_in_rho == pytest.approx(1.0, rel=1e-3)
    assert not report.hints
