"""Make links to files outside of docs/ lead to their page, or to their highlighted source, at the named test."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from included_pages import MARKDOWN, examples

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_INCLUDE = re.compile(r"^```\{include\} (\S+)\n```\n", flags=re.MULTILINE)
_LINK = re.compile(r'\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?:\s+"([^"]*)")?\)')
_FENCE = re.compile(r"(^ *```.*?^ *```)", flags=re.DOTALL | re.MULTILINE)


def expanded(text: str, docname: str) -> str:
    """Return the text of a page, with files included and links that lead out of docs/ made links of the site."""
    place = DOCS / f"{docname}.md"
    included = _INCLUDE.search(text)
    if included:
        file = (place.parent / included[1]).resolve()
        return _with_links(file.read_text(encoding="utf-8"), file, place)
    return _with_links(text, place, place)


def _with_links(text: str, file: Path, place: Path) -> str:
    pages = {ROOT / source: DOCS / page for source, page in {**MARKDOWN, **examples()}.items()}
    pages |= {ROOT / "README.md": DOCS / "index", ROOT / "examples" / "tasks": DOCS / "examples" / "README"}

    def link(found: re.Match[str]) -> str:
        target, anchor, title = found[1], found[2] or "", found[3]
        path = (file.parent / target).resolve()
        if not path.exists():
            return found[0]
        if path in pages:
            page = pages[path]
            suffix = ".rst" if path.suffix == ".py" else ".md"
            kept = anchor if page.name != "index" else ""
            return f"]({_relative(page.with_name(page.name + suffix), place)}{kept})"
        if path.is_relative_to(DOCS):
            words = f' "{title}"' if title else ""
            return f"]({_relative(path, place)}{anchor}{words})"
        name = f"#{title}" if title and title.startswith("test_") else ""
        words = f' "{title}"' if title else ""
        return f"](source:{path.relative_to(ROOT).as_posix()}{name}{words})"

    parts = _FENCE.split(text)
    return "".join(part if part.lstrip().startswith("```") else _LINK.sub(link, part) for part in parts)


def _relative(path: Path, place: Path) -> str:
    return Path(os.path.relpath(path, place.parent)).as_posix()


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Expand the text of a page as it is read."""
    if app.env.doc2path(docname).suffix in (".md", ".ipynb"):
        source[0] = expanded(source[0], docname)


def collect(app: Sphinx, doctree: nodes.document) -> None:
    """Note the files to which a page links."""
    files = {node["refuri"][7:].partition("#")[0] for node in _references(doctree)}
    _files(app.env)[app.env.docname] = files


def _references(doctree: nodes.document) -> Iterator[nodes.reference]:
    return (node for node in doctree.findall(nodes.reference) if node.get("refuri", "").startswith("source:"))


def _files(env: BuildEnvironment) -> dict[str, set[str]]:
    if not hasattr(env, "linked_files"):
        env.linked_files = {}  # type: ignore[attr-defined]
    return env.linked_files  # type: ignore[attr-defined, no-any-return]


def forget(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Forget the links of a page that is read again."""
    _files(env).pop(docname, None)


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Point each link at the highlighted source."""
    for node in _references(doctree):
        file, _, name = node["refuri"][7:].partition("#")
        node["refuri"] = app.builder.get_relative_uri(docname, f"source/{file}") + _line(file, name)
        node["internal"] = True


def _line(file: str, name: str) -> str:
    """Return the anchor of a function, or nothing."""
    if not name:
        return ""
    for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1):
        if re.match(rf"\s*(?:async )?def {name}\b", line):
            return f"#L-{number}"
    raise ValueError(f"{file} has no test {name!r}, to which a page of the documentation links")


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield a page for each file to which a page links."""
    if app.builder.format != "html":
        return
    form = HtmlFormatter(linenos="inline", lineanchors="L", cssclass="highlight")
    for file in sorted(set().union(*_files(app.env).values())):
        text = (ROOT / file).read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(file)
        except ClassNotFound:
            lexer = TextLexer()
        body = f"<h1>{file}</h1>\n<div class='source-file'>{highlight(text, lexer, form)}</div>"
        yield f"source/{file}", {"title": file, "body": body}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the extension."""
    app.connect("source-read", read)
    app.connect("doctree-read", collect)
    app.connect("env-purge-doc", forget)
    app.connect("doctree-resolved", resolve)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False}
