"""Write the pages whose text lies outside of docs/ to docs/examples and docs/project, which are not in git."""

from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

# The page, without its suffix, of each file.
MARKDOWN = {
    "CONTRIBUTING.md": "project/contributing",
    "CHANGELOG.md": "project/changelog",
    "SECURITY.md": "project/security",
    "CODE_OF_CONDUCT.md": "project/code-of-conduct",
    "examples/README.md": "examples/README",
}


def examples() -> dict[str, str]:
    """Return the page, without its suffix, of each example."""
    return {str(p.relative_to(ROOT)): str(p.relative_to(ROOT).with_suffix("")) for p in ROOT.glob("examples/**/*.py")}


def write_pages(app: Sphinx) -> None:
    """Write the pages that have changed."""
    docs = Path(app.srcdir)
    pages = {f"{page}.md": f"```{{include}} {up(page)}{file}\n```\n" for file, page in MARKDOWN.items()}
    for file, page in examples().items():
        title = Path(file).relative_to("examples").as_posix()
        literal = f".. literalinclude:: {up(page)}{file}"
        pages[f"{page}.rst"] = f"{title}\n{'=' * len(title)}\n\n{literal}\n   :language: python\n"
    for name, text in pages.items():
        path = docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    written = {docs / name for name in pages}
    for stale in {path for folder in ("examples", "project") for path in (docs / folder).rglob("*.*")} - written:
        stale.unlink()


def up(page: str) -> str:
    """Return the way from a page's folder to the root of the repository."""
    return "../" * (page.count("/") + 1)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the extension."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
