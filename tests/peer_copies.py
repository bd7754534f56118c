"""Copies of public implementations, loaded from paths in environment variables."""

import importlib.util
import os

import pytest


def load(variable: str, *, package: str = ""):
    """Return the module whose path the environment variable holds; without one, skip the test.

    ``package`` is what its relative imports are relative to, if it has any.
    """
    path = os.environ.get(variable)
    if path is None:
        pytest.skip(f"${variable} does not hold the path of a copy")
    spec = importlib.util.spec_from_file_location(f"{package}.{variable.lower()}".lstrip("."), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
