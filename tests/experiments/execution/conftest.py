from pathlib import Path

import pytest
from executing import DEMO, FIELDS, jobs
from tiny import CPU, RecordingReporter, make_task, recipe

from steppe.experiments.execution.launch import InProcessExecutor
from steppe.experiments.training.stopping import Stop


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    for _ in InProcessExecutor(recipe(**FIELDS, **DEMO), CPU).run(
        jobs(folder, **FIELDS, **DEMO), make_task(robustness=True), folder, RecordingReporter(), Stop()
    ):
        pass
    return folder
