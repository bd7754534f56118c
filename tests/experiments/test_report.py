import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser as made_up
import pytest
from matplotlib.colors import to_rgba
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from tiny import recipe

from steppe.experiments import report
from steppe.experiments.analysis.summary import summarize
from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.figures import pareto
from steppe.experiments.measuring.measure import measured, verdicts
from steppe.experiments.report.payload import payload
from steppe.experiments.storage.run_folder import RunFolder
from steppe.flatness import Flatness

NASTY = """steppe compare '</script><script>broken = 1</script><img src=x onerror=alert(1)>' "&amp;" """
NOTHING: tuple[dict[Run, Flatness], list[Any]] = {}, []


def write(folder: RunFolder) -> Path:
    of, results = made_up.results(folder)
    summary = dataclasses.replace(summarize(of, results), flatness=verdicts(of, measured(folder, of)))
    summary.write(folder)
    return report.write(folder, of, results, summary)


def change(folder: RunFolder, run: Run, **parts: dict[str, Any]) -> None:
    """Change parts of what was measured of a run."""
    file = folder.run(run) / "flatness.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {name: written[name] | part for name, part in parts.items()}))


class Page(HTMLParser):
    """What a reader of the page finds in it: tags, the payload, and the text of the rest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.json, self._inside = "", "", [""]
        self.feed(path.read_text())
        self.payload: dict[str, Any] = json.loads(self.json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside.append("json" if ("type", "application/json") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.append("")

    def handle_data(self, text: str) -> None:
        if self._inside[-1] == "json":
            self.json += text
        elif self._inside[-1] not in ("script", "style"):
            self.text += text


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = made_up.folder(tmp_path / "run", recipe(seeds=2))
    path = write(folder)
    assert path == tmp_path / "run" / "report.html"
    first = path.read_bytes()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert write(RunFolder(tmp_path / "elsewhere")).read_bytes() == first
    made_up.measure(RunFolder(tmp_path / "elsewhere"), recipe(seeds=2), size=0.7)
    assert write(RunFolder(tmp_path / "elsewhere")).read_bytes() != first


def test_what_comes_from_outside_is_text(tmp_path: Path) -> None:
    of = recipe(seeds=2, name="<b onclick=alert(1)>")
    folder = made_up.folder(tmp_path / "run", of, command=NASTY)
    for run in of.runs():
        change(folder, run, measures={name: {"value": 1.0, "note": NASTY} for name in ("sharpness", "loss")})
    page = Page(write(folder))
    assert page.tags.count("script") == 3, "the payload, plotly and the page's own"
    assert "img" not in page.tags
    assert not set("<>&") & set(page.json)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(NASTY.strip()) >= 4, "the command and the note, twice each, as they were written"
    assert page.payload["runs"][0]["values"]["sharpness"] == 1.0


def test_what_a_verdict_adds_is_said(tmp_path: Path) -> None:
    of = recipe(seeds=3)
    folder = made_up.folder(tmp_path / "run", of)
    assert "minimum flatter" in Page(write(folder)).text
    for run in of.runs():
        if run.method == "sam":
            change(folder, run, measures={"loss": {"value": 100.0}, "normalized_sharpness": {"value": 100.0}})
    text = Page(write(folder)).text
    assert "flatness inconclusive" in text
    assert "cannot be told apart here" in text


def test_the_verdict_is_the_summary_s_and_no_file_s(tmp_path: Path) -> None:
    of = recipe(seeds=3)
    folder = made_up.folder(tmp_path / "run", of)
    file = folder.path / "flatness.json"  # as an earlier version wrote it
    old = {"verdicts": [{"method": "sam", "verdict": "sharper", "sentence": "An old sentence."}], "text": ["Old."]}
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    text = Page(write(folder)).text
    assert "minimum flatter" in text
    assert "An old sentence." not in text
    change(folder, next(of.runs()), settings={"samples": 1})
    results = made_up.results(folder)[1]
    report.write(folder, of, results, summarize(of, results))  # which has none, as the runs cannot be compared
    assert "flatness no verdict" in Page(folder.path / "report.html").text


def test_nothing_is_asked_from_a_network(tmp_path: Path) -> None:
    page = Page(write(made_up.folder(tmp_path / "run", recipe())))
    assert {"link", "script", "meta"} <= set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "srcset", "data", "poster", "action")]
    assert sources == []
    links = [value or "" for name, value in page.attributes if name == "href"]
    assert {link[:5] for link in links} == {"data:", "https"} | {link[:5] for link in links if link.startswith("#")}
    assert all(link.startswith("https://arxiv.org/") for link in links if link.startswith("http"))
    (policy,) = (value or "" for name, value in page.attributes if name == "content" and "default-src" in (value or ""))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    assert "unsafe-eval" not in policy


def test_without_flatness_the_page_says_how_to_measure_it(tmp_path: Path) -> None:
    of = recipe(seeds=2, out=Path("runs/my own"))
    text = Page(write(made_up.folder(tmp_path / "run", of, measured=False))).text
    assert "Flatness has not been measured in this run folder." in text
    assert text.count("steppe measure 'runs/my own'") == 2
    assert "flatness not measured" in text
    assert "largest Hessian eigenvalue" not in text


def test_verdicts_are_said_as_they_are(tmp_path: Path) -> None:
    many = recipe(seeds=3, methods=("sgd", "sam", "asam"))
    folder = made_up.folder(tmp_path / "run", many)
    text = Page(write(folder)).text
    assert "SAM and ASAM against SGD: test accuracy and generalization gap better; minima flatter." in text
    for sentence in json.loads((tmp_path / "run" / "summary.json").read_text())["differences"]:
        assert re.sub(r"-(?=\d)", "−", sentence["verdict"]) in text
    sgd, sam, _ = (made_up.results(folder)[1][run] for run in list(many.runs())[:3])
    folder = made_up.folder(tmp_path / "same", recipe(seeds=2), measured=False)
    for run in recipe(seeds=2).runs():  # two methods of which each is better once
        best = (run.method == "sam") == (run.seed == 0)
        (folder.run(run) / "metrics.jsonl").write_text(json.dumps((sam if best else sgd)[-1].to_json()) + "\n")
    text = Page(write(folder)).text
    assert "SAM against SGD: test accuracy and generalization gap not distinguishable; flatness not measured." in text
    assert "better" not in text.partition("Training")[0]


def test_one_run_gives_no_verdict_and_has_no_spread(tmp_path: Path) -> None:
    page = Page(write(made_up.folder(tmp_path / "run", recipe())))
    assert "One run of each method gives no verdict" in page.text
    assert "±" not in page.text.partition("Flat is not one thing")[2].partition("Mean ±")[0], "no spread in the table"
    assert all(sd is None for curve in page.payload["curves"] for sd in curve["sd"])
    assert not any(curve["several"] for curve in page.payload["curves"])
    assert all(value["sd"] is None for panel in page.payload["pareto"] for value in panel["cost"])


def test_a_run_folder_with_nothing_in_it_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.claim(recipe(), 1)
    assert "Nothing has been measured yet." in Page(write(folder)).text


def test_a_hole_in_a_landscape_stays_one(tmp_path: Path) -> None:
    folder = made_up.folder(tmp_path / "run", recipe())
    run, (i, j) = next(recipe().runs()), made_up.HOLE
    losses = json.loads((folder.run(run) / "flatness.json").read_text())["landscape"]["losses"]
    losses[i][j] = float("nan")  # as another JSON writer might
    change(folder, run, landscape={"losses": losses})
    first = Page(write(folder)).payload["runs"][0]
    assert [(a, b) for a, row in enumerate(first["landscape"]["losses"]) for b, v in enumerate(row) if v is None] == [
        (i, j)
    ]


def test_the_profile_is_the_landscape_s_middle(tmp_path: Path) -> None:
    first = Page(write(made_up.folder(tmp_path / "run", recipe()))).payload["runs"][0]
    profile, landscape = first["profile"], first["landscape"]
    assert profile["axis"] == landscape["axis"]
    assert profile["losses"] == [row[made_up.POINTS // 2] for row in landscape["losses"]]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "steppe flatness, version 9"}'])
def test_a_damaged_file_is_named_and_the_old_page_stays(tmp_path: Path, content: str) -> None:
    folder = made_up.folder(tmp_path / "run", recipe())
    before = write(folder).read_bytes()
    file = folder.run(next(recipe().runs())) / "flatness.json"
    file.write_text(content)
    with pytest.raises(ExperimentError, match=f"{re.escape(str(file))} is damaged.*steppe measure"):
        write(folder)
    assert (folder.path / "report.html").read_bytes() == before


def test_pareto_shows_what_the_figure_shows(tmp_path: Path) -> None:
    three = recipe(seeds=3, methods=("sgd", "sam", "late_sam"), epochs=8)
    of, results = made_up.results(made_up.folder(tmp_path / "run", three, measured=False))
    panels = payload(of, results, *NOTHING)["pareto"]
    assert [panel["methods"] for panel in panels] == [["sgd", "sam"], ["sgd", "sam"], ["sgd", "sam", "late_sam"]]
    axes = iter(pareto.draw(of, results).axes)
    for field in ("test_accuracy", "gap"):
        for panel in panels:
            drawn = next(axes).containers
            points = [tuple(container[0].get_xydata()[0]) for container in drawn]
            costs, values = panel["cost"], panel[field]["values"]
            assert points == [(c["mean"], v["mean"]) for c, v in zip(costs, values, strict=True)]
            white = to_rgba("white")
            filled = [i for i, c in enumerate(drawn) if to_rgba(c[0].get_markerfacecolor()) != white]
            assert filled == sorted(panel[field]["front"])


def test_sharpness_while_training_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    of, results = made_up.results(made_up.folder(tmp_path / "run", recipe(), measured=False))
    assert not {"sharpness", "lambda_max"} & set(payload(of, results, *NOTHING)["quantities"])
    some = {
        run: [dataclasses.replace(r, lambda_max=3.0 if run.method == "sam" else None) for r in records]
        for run, records in results.items()
    }
    shown = [curve for curve in payload(of, some, *NOTHING)["curves"] if curve["field"] == "lambda_max"]
    assert [(curve["method"], curve["mean"]) for curve in shown] == [("sam", [3.0, 3.0])]


# Everything below happens in one browser, on one page.
in_browser = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of = recipe(seeds=3, epochs=6)
    return write(made_up.folder(tmp_path_factory.mktemp("report") / "run", of, command=NASTY))


@pytest.fixture(scope="module")
def chrome(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with made_up.chromium(tmp_path_factory.mktemp("profile")) as chrome:
        chrome.get("about:blank")
        chrome.get_log("performance")  # what the browser shows before any page
        chrome.get(page.as_uri())
        yield chrome


def come_to(chrome: Chrome, selector: str) -> Any:
    """Scroll to an element and wait until its plot, if it is one, is drawn as the page's state says."""
    found = chrome.find_element(By.CSS_SELECTOR, selector)
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found)
    if "plot" in (found.get_attribute("class") or ""):
        until(chrome, "const e = arguments[0]; return Boolean(e._fullLayout && drawn.has(e) && !stale.has(e))", found)
    return found


def until(chrome: Chrome, script: str, *arguments: Any) -> None:
    WebDriverWait(chrome, made_up.PATIENCE).until(lambda c: c.execute_script(script, *arguments))


def press(chrome: Chrome, selector: str) -> None:
    """Press a button, which may be far from the window."""
    chrome.execute_script("arguments[0].click()", chrome.find_element(By.CSS_SELECTOR, selector))


def severe(chrome: Chrome) -> list[dict[str, Any]]:
    return [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]


def together(chrome: Chrome, before: dict[str, float]) -> dict[str, float]:
    """Wait until both surfaces are seen from one place that is not the one before."""

    def there(chrome: Chrome) -> dict[str, float] | None:
        ours, theirs = chrome.execute_script(EYES)
        return ours if ours != pytest.approx(before) and ours == pytest.approx(theirs) else None

    return WebDriverWait(chrome, made_up.PATIENCE).until(there)  # type: ignore[return-value]


PLOTS = ("#curve-gap", "#pareto-gap", "#gap-over", "#spectrum", "#ranks", "#profile", "#lines")
SURFACES = tuple(f".surface[data-surface={method}]" for method in ("sgd", "sam"))
EYES = f"return {list(SURFACES)}.map((s) => document.querySelector(s)._fullLayout.scene._scene.getCamera().eye)"


@in_browser
def test_the_page_opens_quietly_and_its_landscapes_turn_together(chrome: Chrome, page: Path) -> None:
    press(chrome, "[data-choice=view] [data-value='3d']")
    for plot in (*PLOTS, *SURFACES):
        come_to(chrome, plot)
    first, second = chrome.execute_script(EYES)
    assert first == second
    surface = come_to(chrome, SURFACES[0])
    ActionChains(chrome).move_to_element(surface).click_and_hold().move_by_offset(60, 25).release().perform()
    turned = together(chrome, first)
    surface.send_keys(Keys.ARROW_LEFT)
    together(chrome, turned)

    scenes = f"return {list(SURFACES)}.map((s) => document.querySelector(s)).map((e) => [e.layout.scene, e.data[0].z])"
    (sgd, z), (sam, _) = chrome.execute_script(scenes)
    assert sgd["zaxis"]["range"] == sam["zaxis"]["range"]
    assert sgd["xaxis"]["range"] == sam["yaxis"]["range"]
    i, j = made_up.HOLE
    assert [(a, b) for b, row in enumerate(z) for a, value in enumerate(row) if value is None] == [(i, j)]

    assert severe(chrome) == []
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {page.as_uri()}


@in_browser
def test_contours_and_the_choices_of_seed_and_directions(chrome: Chrome) -> None:
    come_to(chrome, "#surfaces")
    press(chrome, "[data-choice=view] [data-value='2d']")
    shown = []
    for choice in ("[data-choice=seed] [data-value='1']", "[data-choice=seed] [data-value='0']", "[data-value^=eigen]"):
        press(chrome, choice)
        contour = come_to(chrome, ".contour[data-surface=sgd]")
        shown.append(chrome.execute_script("return arguments[0].data[0]", contour))
    assert {one["type"] for one in shown} == {"contour"}
    assert len({json.dumps(one["customdata"]) for one in shown}) == 3
    assert not chrome.find_elements(By.CSS_SELECTOR, ".surface")
    press(chrome, "[data-value=landscape]")


@in_browser
def test_a_contender_is_switched_off_everywhere(chrome: Chrome) -> None:
    visible = "return arguments[0].data.filter((trace) => trace.meta === 'sam' && trace.visible !== false).length"
    press(chrome, "[data-choice=view] [data-value='2d']")
    come_to(chrome, ".contour[data-surface=sam]")
    press(chrome, "[data-chip=sam]")
    assert not [plot for plot in PLOTS if chrome.execute_script(visible, come_to(chrome, plot))]
    assert not chrome.find_element(By.CSS_SELECTOR, ".contour[data-surface=sam]").is_displayed()
    assert "off" in str(chrome.find_element(By.CSS_SELECTOR, "tr[data-method=sam]").get_attribute("class"))
    assert chrome.find_element(By.CSS_SELECTOR, "[data-chip=sam]").get_attribute("aria-pressed") == "false"
    press(chrome, "[data-chip=sam]")
    assert all(chrome.execute_script(visible, come_to(chrome, plot)) for plot in PLOTS)


@in_browser
def test_the_numbers_are_those_of_the_summary(chrome: Chrome, page: Path) -> None:
    summary = json.loads((page.parent / "summary.json").read_text())
    for row in summary["rows"]:
        for column, field in (("test accuracy", "test_accuracy"), ("gap", "gap"), ("train accuracy", "train_accuracy")):
            where = f"#summary-table [data-method='{row['method']}'] [data-column='{column}']"
            mean, _, sd = str(chrome.find_element(By.CSS_SELECTOR, where).get_attribute("textContent")).partition(" ± ")
            assert float(mean.replace("−", "-")) == pytest.approx(row[field]["mean"], abs=0.005)
            assert float(sd) == pytest.approx(row[field]["sd"], abs=0.005)
    gap = come_to(chrome, "#curve-gap")
    last = "return arguments[0].data.filter((trace) => trace.text).map((trace) => [trace.meta, trace.y.at(-1)])"
    assert chrome.execute_script(last, gap) == [[row["method"], row["gap"]["mean"]] for row in summary["rows"]]
    (difference,) = summary["differences"]
    assert re.sub(r"-(?=\d)", "−", difference["verdict"]) in chrome.find_element(By.CSS_SELECTOR, ".details").text


@in_browser
def test_time_instead_of_compute(chrome: Chrome) -> None:
    x = "return arguments[0].data.find((trace) => trace.text).x"
    assert chrome.execute_script(x, come_to(chrome, "#curve-gap")) == [2, 4, 6]
    press(chrome, "[data-choice=extent] [data-value=seconds]")
    assert chrome.execute_script(x, come_to(chrome, "#curve-gap"))[-1] > 11
    press(chrome, "[data-choice=extent] [data-value=standardized_epoch]")


@in_browser
def test_the_theme_is_that_of_the_page_and_of_the_plots(chrome: Chrome) -> None:
    colors = """return [getComputedStyle(document.body).backgroundColor, arguments[0]._fullLayout.font.color,
        arguments[0].querySelector('.xtick text').style.fill, arguments[0].data.at(-1).line.color]"""
    before = chrome.execute_script(colors, come_to(chrome, "#curve-gap"))
    press(chrome, "#theme")
    after = chrome.execute_script(colors, come_to(chrome, "#curve-gap"))
    assert all(a != b for a, b in zip(before, after, strict=True))
    press(chrome, "#theme")
    assert chrome.execute_script(colors, come_to(chrome, "#curve-gap")) == before


@in_browser
def test_a_phone_scrolls_down_only(chrome: Chrome) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for place in ("#curve-gap", "#flatness-table", "#spectrum", "#surfaces", "#lines", "#reproduce pre"):
            come_to(chrome, place)
            until(chrome, "return innerWidth === 360")
            widest = "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
            assert chrome.execute_script(widest) == 360
    finally:
        chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_browser
def test_a_script_that_is_not_of_the_page_does_not_run(chrome: Chrome) -> None:
    assert severe(chrome) == []
    foreign = "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.head.append(s)"
    chrome.execute_script(foreign)
    assert chrome.execute_script("return window.broken") is None
    assert any("Content Security Policy" in entry["message"] for entry in severe(chrome))


@in_browser
def test_without_webgl_there_are_contours(chrome: Chrome, page: Path) -> None:
    none = """const old = HTMLCanvasElement.prototype.getContext;
        HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
          return kind.startsWith('webgl') ? null : old.call(this, kind, ...more); };"""
    added = chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": none})
    try:
        chrome.get(page.as_uri())
        come_to(chrome, ".contour[data-surface=sgd]")
        assert chrome.find_element(By.ID, "no-webgl").is_displayed()
        assert not chrome.find_element(By.CSS_SELECTOR, "[data-value='3d']").is_enabled()
        assert severe(chrome) == []
    finally:
        chrome.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
