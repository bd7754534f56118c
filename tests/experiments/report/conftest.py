"""One page with everything in it, and one browser, for all tests of a process."""

from collections.abc import Iterator
from pathlib import Path

import browser as made_up
import pytest
from selenium.webdriver import Chrome
from tiny import recipe

from steppe.experiments.report.figures import Figures


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    command = f"{made_up.NASTY} {20 * '--methods sgd sam '}"
    of = recipe(seeds=3, epochs=6)
    return made_up.write(made_up.folder(folder, of, robust=True, command=command), Figures.SECTIONS)


@pytest.fixture(scope="session")
def chrome(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with made_up.chromium(tmp_path_factory.mktemp("profile")) as chrome:
        chrome.get("about:blank")
        chrome.get_log("performance")  # what the browser shows before any page
        chrome.get(page.as_uri())
        yield chrome
