"""docs/tasks.md: its Python blocks run in a folder of their own, one after the other."""

import re
from pathlib import Path

import pytest
import torch

from steppe.experiments.report import page
from steppe.experiments.tasks.check import check
from steppe.experiments.tasks.task import Task

PAGE = Path(__file__).parents[3] / "docs" / "tasks.md"


@pytest.mark.slow
def test_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: None)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    result = names["result"]
    assert [run.method.name for run in result.results][:2] == ["base", "sam"]  # type: ignore[attr-defined]
    tasks = [thing for thing in names.values() if isinstance(thing, Task)]
    assert [check(task, torch.device("cpu")).description.split()[0] for task in tasks] == [
        "Sequential", "Sequential", "BertForSequenceClassification", "Sequential",
    ]  # fmt: skip
