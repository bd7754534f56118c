"""Hooks for all tests: one thread, module-scoped fixtures in one worker, compiled functions for one module."""

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a module that share a module-scoped fixture in one worker of pytest-xdist."""
    for item in items:
        definitions = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009 (only test functions have it)
        shared = [found[-1].argname for found in definitions if found[-1].scope == "module"]
        if shared and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forget what a module has compiled: SAM watches no forwards in a process that has called torch.compile."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and (nextitem is None or nextitem.path != item.path):
        dynamo.reset()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run each test on one thread: tiny networks are slower on several, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
