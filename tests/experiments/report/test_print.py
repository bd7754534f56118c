import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import browser as made_up
import pytest
from browser import press
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from tiny import recipe

pytestmark = pytest.mark.xdist_group("browser")

WIDTH = 642
"""Of an A4 page with margins of 2 cm, in pixels."""
MANY = ("sgd", "sam", "asam", "msam", "gsam", "esam", "looksam")
CUT = """
    const seen = (element) => !element.closest('svg') || element.localName === 'text' || element.localName === 'svg';
    const cut = (element) => {
      const {left, right, width} = element.getBoundingClientRect();
      if (!width || getComputedStyle(element).visibility === 'hidden') return false;
      const hides = getComputedStyle(element).overflowX !== 'visible' && element.clientWidth;
      return left < -1 || right > innerWidth + 1 || (hides && element.scrollWidth > element.clientWidth + 1);
    };
    return [...document.querySelectorAll('main *, .bar *')].filter((element) => seen(element) && cut(element))
      .map((element) => `${element.localName}.${element.className.baseVal ?? element.className}`);
"""
"""Elements that are wider than the page, or than the element that cuts them off."""


@contextmanager
def on_paper(chrome: Chrome) -> Iterator[None]:
    """Show the page as it is printed."""
    size = {"width": WIDTH, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_script("dispatchEvent(new Event('beforeprint'))")
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        chrome.execute_script("dispatchEvent(new Event('afterprint'))")


def test_printed_page_cuts_nothing_off_and_surfaces_are_beside_each_other(chrome: Chrome, page: Path) -> None:
    chrome.get(page.as_uri())
    press(chrome, "[data-choice=view] [data-value='3d']")
    with on_paper(chrome):
        assert chrome.execute_script(CUT) == []
        boxes = """return [...document.querySelectorAll('canvas')].map((canvas) => canvas.getBoundingClientRect())
            .map(({left, right, top}) => ({left, right, top}))"""
        first, second = chrome.execute_script(boxes)
        assert first["top"] == second["top"]
        assert first["left"] < first["right"] < second["left"] < second["right"] <= WIDTH
        for selector in ("details .scrolling", ".chip", "#robustness-table", "[data-figure=robustness]"):
            assert chrome.find_element(By.CSS_SELECTOR, selector).is_displayed()


def test_printed_page_of_a_dark_screen_is_light_and_the_screen_is_restored(chrome: Chrome, page: Path) -> None:
    chrome.get(page.as_uri())
    press(chrome, "#theme")
    state = "return [document.documentElement.dataset.theme, document.querySelectorAll('details[open]').length]"
    on = "addEventListener('beforeprint', () => { window.printed = window.read() })"
    chrome.execute_script(f"window.read = () => {{ {state} }}; {on}")
    before = chrome.execute_script(state)
    assert base64.b64decode(chrome.print_page()).startswith(b"%PDF")
    assert chrome.execute_script("return printed") == ["light", 2]
    assert chrome.execute_script(state) == before
    press(chrome, "#theme")


@pytest.mark.parametrize("number", [4, 7])
def test_printed_tables_of_many_methods_are_whole(chrome: Chrome, tmp_path: Path, number: int) -> None:
    folder = made_up.folder(tmp_path / "run", recipe(seeds=2, methods=MANY[:number]), robust=True)
    chrome.get(made_up.write(folder).as_uri())
    with on_paper(chrome):
        assert chrome.execute_script(CUT) == []
        cells = "return [...document.querySelectorAll('#flatness-table td')].filter((td) => td.innerText.trim()).length"
        assert chrome.execute_script(cells) >= number * len(made_up.MEASURES)
