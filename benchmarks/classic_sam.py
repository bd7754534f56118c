"""Import the classic implementation of SAM, the file sam.py of github.com/davda54/sam, from a path."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(path: Path) -> ModuleType:
    """Import one Python file under its own name.

    Raises:
        SystemExit: the path is not that of a Python file.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file; give the sam.py of github.com/davda54/sam")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # pickle looks classes up here
    spec.loader.exec_module(module)
    return module


def version(path: Path) -> str:
    """Return the name that git gives to the content: the file has no version of its own."""
    content = path.read_bytes()
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return f"git blob {digest[:7]}"
