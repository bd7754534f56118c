"""Count all setups, in as many processes as there are cores."""

import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import peft
import transformers

from lora_memory.count import MODELS, TINY, counted, setups
from steppe.experiments.execution.cpus import available

FEW, MANY, LENGTH = 1, 8, 512


def measure(*, tiny: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the counted rows, and the versions that they depend on."""
    chosen = setups(TINY, 1, 2, 16) if tiny else setups(MODELS, FEW, MANY, LENGTH)
    rows = []
    with ProcessPoolExecutor(available(), get_context("spawn"), _ignore_imports) as pool:
        for number, values in enumerate(pool.map(counted, chosen), 1):
            rows.append(values)
            print(f"{number}/{len(chosen)}: {values}", flush=True)
    return {"rows": rows}, {"peft": peft.__version__, "transformers": transformers.__version__}


def _ignore_imports() -> None:
    """Let the collection of garbage, which each count runs, skip what the imports have made: that takes seconds."""
    gc.freeze()
