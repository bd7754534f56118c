"""timm imports torchvision at its own import. Where there is none, this stands in for what timm asks of it by name.

``python torchvision_stand_in.py script.py`` runs a script with it.
"""

import importlib.util
import runpy
import sys
import types
from contextlib import contextmanager
from pathlib import Path


class _Named(type):
    """Classes whose every attribute exists, for InterpolationMode.BICUBIC and the like."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Named(name, (), {})
        setattr(cls, name, value)
        return value


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Named(name, (), {})
        setattr(self, name, value)
        return value


@contextmanager
def stood_in():
    """Let timm be imported in this block; afterwards there is no torchvision again, for those who look for it."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    parts = ("ops", "ops.misc", "transforms", "transforms.functional", "datasets")
    names = ("torchvision", *(f"torchvision.{part}" for part in parts))
    for name in names:
        sys.modules[name] = _Module(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    with stood_in():
        runpy.run_path(sys.argv[0], run_name="__main__")
