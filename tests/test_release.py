"""What a release needs: one version everywhere, a dated changelog, forms and hooks that can be read."""

import datetime
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import release_check
import steppe
from steppe.experiments.storage import checkpoint_file, run_folder
from steppe.experiments.tuning import tune
from steppe.flatness import result

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def sections() -> list[tuple[str, str]]:
    """Return version and date of each released section of the changelog, the latest first."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    headings = headings[1:] if headings[0] == "Unreleased" else headings
    return [re.fullmatch(r"(\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", heading).groups() for heading in headings]


def test_version_is_the_same_everywhere():
    assert sections()[0][0] == steppe.__version__ == PROJECT["version"] == CITATION["version"]


def test_citation_has_the_date_of_the_changelog():
    assert CITATION["date-released"] == datetime.date.fromisoformat(sections()[0][1])
    assert CITATION["cff-version"] == "1.2.0"
    assert {"title", "authors", "message", "license"} <= CITATION.keys()
    assert CITATION["license"] == PROJECT["license"]


def test_classifiers_name_the_tested_versions_of_python():
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    assert f">={min(named)}" == PROJECT["requires-python"]
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert named == set(re.findall(r"^\| (3\.\d+) \|", page, flags=re.MULTILINE))


def test_older_python_is_named_before_anything_fails(monkeypatch):
    import setuptools  # noqa: F401  with the true version

    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert str(raised.value) == f"Steppe needs Python {oldest} or later, and this is Python 3.10.13."


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("form", [path for path in FORMS if path.stem != "config"], ids=lambda path: path.stem)
def test_forms_of_issues_can_be_read(form):
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= content.keys()
    assert len({field["id"] for field in content["body"]}) == len(content["body"])
    for field in content["body"]:
        assert field["type"] in ("textarea", "input")
        assert field["attributes"]["label"]


def test_forms_are_complete():
    assert [path.stem for path in FORMS] == ["bug", "config", "feature"]
    assert (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").is_file()


def test_hooks_before_a_commit_are_the_checks_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    entries = {hook["entry"].replace(" --force-exclude", "") for hook in hooks}
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    checks = {line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()}
    assert entries == {check.removesuffix(" .") for check in checks}
    assert len({hook["id"] for hook in hooks}) == len(hooks)


def test_formats_of_files_are_those_that_the_page_lists():
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| .* \| `(steppe [^`]*, version \d+)` \|$", page, flags=re.MULTILINE))
    assert listed == {run_folder._FORMAT, checkpoint_file._FORMAT, tune._FORMAT, result.FORMAT}
    assert "formats that {}.{} reads".format(*steppe.__version__.split(".")[:2]) in page


# --- scripts/release_check.py ---


def test_release_check_knows_the_files_of_a_wheel():
    complete = sorted(release_check.files_of_package())
    assert {"steppe/sam.py", "steppe/py.typed", "steppe/variants.pyi", "steppe/methods/measured.json"} <= set(complete)
    with_metadata = [*complete, "steppe-9.8.7.dist-info/METADATA"]
    assert not release_check.problems_of_wheel(with_metadata, 700_000)
    for name in ("steppe/py.typed", "steppe/sam.py"):
        others = [other for other in complete if other != name]
        assert release_check.problems_of_wheel(others, 700_000) == [f"{name} is missing"]
    image = "steppe/experiments/data/sample/fashion-mnist-sample.npz"
    assert release_check.problems_of_wheel([*complete, image], 700_000) == [f"{image} does not belong there"]
    (too_large,) = release_check.problems_of_wheel(complete, 2_000_000)
    assert "2.0 MB" in too_large


def test_release_check_lists_what_is_left_to_do_by_hand():
    left = release_check.left_to_do({"version": "9.8.7", "urls": {}}, dirty=True)
    assert any("[project.urls]" in line for line in left)
    assert any("uncommitted" in line for line in left)
    assert any("v9.8.7" in line for line in left)
    done = release_check.left_to_do({"version": "9.8.7", "urls": {"Repository": "https://example.org"}}, dirty=False)
    assert len(done) == len(left) - 2
