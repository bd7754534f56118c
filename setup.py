"""The description on a package index: README.md, whose links and commands work there; see `description`."""

import re
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def description(readme: str, version: str, repository: str | None) -> str:
    """Return the README for a package index, which has none of the files beside it.

    Links and images lead to the files of the released version in the repository, whose address is
    `[project.urls] Repository` of pyproject.toml and stands nowhere else. Without an address, the text of a link and
    the description of an image remain. `pip install .` becomes `pip install steppe`.
    """

    def absolute(match: re.Match[str]) -> str:
        is_image, text, path = match["image"] == "!", match["text"], match["path"]
        if repository is None:
            return f"*{text}*" if is_image else text
        return f"{match['image']}[{text}]({repository.rstrip('/')}/{'raw' if is_image else 'blob'}/v{version}/{path})"

    links = r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:)(?P<path>[^)\s]+)\)"
    text = re.sub(links, absolute, readme)
    return re.sub(r"(pip install '?)\.(?=[\['\s])", r"\1steppe", text)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  pip reads `requires-python` only after this file has run
        sys.exit(f"Steppe needs Python 3.11 or later, and this is Python {'.'.join(map(str, sys.version_info[:3]))}.")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=description(
            (ROOT / "README.md").read_text(encoding="utf-8"), project["version"], project["urls"].get("Repository")
        ),
        long_description_content_type="text/markdown",
    )
