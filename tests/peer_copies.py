"""Copies of public implementations, loaded from paths in environment variables."""

import importlib.util
import os

import pytest


def load(variable: str):
    """Return the module whose path the environment variable holds; without one, skip the test."""
    path = os.environ.get(variable)
    if path is None:
        pytest.skip(f"${variable} does not hold the path of a copy")
    spec = importlib.util.spec_from_file_location(variable.lower(), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
