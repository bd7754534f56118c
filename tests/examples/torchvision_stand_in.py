"""A stand-in for torchvision, which timm imports but does not need here.

``python torchvision_stand_in.py script.py`` runs a script with it.
"""

import importlib.util
import runpy
import sys
import types
from contextlib import contextmanager
from pathlib import Path


class _AnyAttribute(type):
    """The type of classes that have every attribute, such as InterpolationMode.BICUBIC."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = _AnyAttribute(name, (), {})
        setattr(cls, name, value)
        return value


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = _AnyAttribute(name, (), {})
        setattr(self, name, value)
        return value


@contextmanager
def torchvision_stand_in():
    """Put the stand-in into sys.modules while the block imports timm, unless torchvision is installed."""
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
    with torchvision_stand_in():
        runpy.run_path(sys.argv[0], run_name="__main__")
