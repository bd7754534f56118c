"""The package of the user's Trainer, ``lightning.pytorch`` or ``pytorch_lightning``: the one imported first."""

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    # Their classes differ, so a callback made from the wrong one is not a Callback to the user's Trainer.
    _names = sorted(["lightning.pytorch", "pytorch_lightning"], key=lambda name: name not in sys.modules)
    try:
        pl = importlib.import_module(next(name for name in _names if importlib.util.find_spec(name.partition(".")[0])))
    except StopIteration:
        raise ImportError(
            "steppe.integrations.lightning needs Lightning, which is not installed: pip install 'steppe[lightning]'"
        ) from None

__all__ = ["pl"]
