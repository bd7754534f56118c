"""Write each page as plain Markdown beside the HTML, and llms.txt, which lists them."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import api_pages
import repository_links

_DIRECTIVE = re.compile(r"^```\{.*?^```\n?", flags=re.DOTALL | re.MULTILINE)


def markdown(path: Path, docname: str) -> str:
    """Return a page as Markdown, whose links lead to other pages as Markdown, and to the sources as HTML."""
    text = path.read_text(encoding="utf-8")
    if docname.startswith("api/") and path.suffix == ".rst":
        module = docname.removeprefix("api/")
        return api_pages.plain(module, api_pages.documented()[module])
    if path.suffix == ".rst":
        code = (repository_links.ROOT / f"{docname}.py").read_text(encoding="utf-8")
        return f"# {Path(docname).name}.py\n\n```python\n{code}```\n"
    text = repository_links.expanded(text, docname)
    if path.suffix == ".ipynb":
        text = _notebook(json.loads(text))
    up = "../" * docname.count("/")
    text = re.sub(r"\]\(source:([^#)\s]+)(?:#[^)\s]*)?", rf"]({up}source/\1.html", text)
    text = re.sub(r"\]\(((?:\.\./)*)images/", r"](\1_images/", text)  # where Sphinx copies them
    text = re.sub(r"(\]\([^):\s]+)\.(?:rst|ipynb)(?=[#)\s])", r"\1.md", text)
    return _DIRECTIVE.sub("", text)


def _notebook(notebook: dict[str, Any]) -> str:
    texts = (("".join(cell["source"]), cell["cell_type"]) for cell in notebook["cells"])
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in texts) + "\n"


def llms(app: Sphinx) -> str:
    """Return llms.txt: all pages in the order of the navigation, each with its first sentence."""
    lines = ["# Steppe", "", f"> {metadata.metadata('steppe')['Summary']}", ""]
    for tree in app.env.get_doctree("index").findall(addnodes.toctree):
        lines += [f"## {tree['caption']}", ""]
        for docname in tree["includefiles"]:
            lines += [_entry(app, name) for name in (docname, *app.env.toctree_includes.get(docname, ()))]
        lines += [""]
    return "\n".join(lines)


def _entry(app: Sphinx, docname: str) -> str:
    title = app.env.titles[docname].astext()
    paragraph = next(app.env.get_doctree(docname).findall(nodes.paragraph), None)
    sentence = "" if paragraph is None else re.split(r"(?<=[.?!:])\s", " ".join(paragraph.astext().split()))[0]
    return f"- [{title}]({docname}.md)" + (f": {sentence}" if sentence else "")


def write(app: Sphinx, exception: Exception | None) -> None:
    """Write the files once the site is built."""
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    for docname in app.env.found_docs:
        path = out / f"{docname}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(Path(app.env.doc2path(docname)), docname), encoding="utf-8")
    (out / "llms.txt").write_text(llms(app), encoding="utf-8")


def link(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Name the Markdown of a page in its head."""
    if pagename in app.env.found_docs:
        name = Path(pagename).name
        context["metatags"] += f'\n<link rel="alternate" type="text/markdown" href="{name}.md" title="Markdown">'


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the extension."""
    app.connect("build-finished", write)
    app.connect("html-page-context", link)
    return {"parallel_read_safe": True}
