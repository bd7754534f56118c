"""Hooks for all tests: one thread, what is shared in one worker, compiled functions for one module."""

import gc
import sys
from collections.abc import Iterator

import hypothesis  # noqa: F401 (as it is imported, it asks the garbage collection for objects that are frozen below)
import pytest
import torch

gc.disable()  # until all tests are imported: nearly nothing of what is made before is garbage


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep in one worker of pytest-xdist the tests that share processes, and those that share a fixture of a module."""
    for item in items:
        if hasattr(getattr(item, "module", None), "start_ranks"):
            item.add_marker(pytest.mark.xdist_group("ranks"))
        definitions = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009 (only test functions have it)
        shared = [found[-1].argname for found in definitions if found[-1].scope == "module"]
        if shared and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish() -> None:
    """Leave out of every garbage collection what the tests have imported: a training of Accelerate starts some."""
    freeze_what_is_imported()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forget what a module has compiled: SAM watches no forwards in a process that has called torch.compile."""
    if nextitem is not None and nextitem.path == item.path:
        return
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    freeze_what_is_imported()


imported = 0


def freeze_what_is_imported() -> None:
    """Keep the garbage collection away from all objects, once a hundred modules are new: else one takes 0.4 s."""
    global imported
    if len(sys.modules) - imported > 100:
        imported = len(sys.modules)
        gc.collect()
        gc.freeze()


def keep_no_stacks_of_seeds() -> None:
    """Let torch.manual_seed forget the GPUs that are not there: for each it formats and keeps the stack of its caller.

    With the stack of a test this takes 0.4 ms, which is as long as a pass of a tiny network.
    """
    for device, module in ((torch.cuda, torch.cuda.random), (torch.xpu, torch.xpu.random), (torch.mtia, torch.mtia)):
        if not device.is_available():
            module._lazy_call = lambda *_, **__: None


keep_no_stacks_of_seeds()


@pytest.fixture(autouse=True)
def no_hooks_of_optimizers_of_other_tests() -> None:
    """Begin each test without hooks on all forwards: one is there while an optimizer waits for its first pass.

    torch.compile warns of them, and compiles again, or fails, when the garbage collection removes such an optimizer.
    """
    torch.nn.modules.module._global_forward_pre_hooks.clear()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run each test on one thread: tiny networks are slower on several, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
