"""One module per implementation, which builds, steps, saves and loads it as in its own documentation.

To add an implementation, add a module with its ``ADAPTER`` here and one line in peers.py.
"""

import importlib

from conformance.adapters.base import Adapter


def load(key: str) -> Adapter:
    """Return the adapter called ``key``. It can be imported in the implementation's environment only."""
    return importlib.import_module(f"conformance.adapters.{key}").ADAPTER
