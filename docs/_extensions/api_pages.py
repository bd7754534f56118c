"""Write one page of the API reference for each public module, from its public names; docs/api is not in git."""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

from steppe.papers import Paper

MODULES = (
    "steppe",
    "steppe.variants",
    "steppe.closures",
    "steppe.rules",
    "steppe.rules.ops",
    "steppe.rho_schedule",
    "steppe.mup",
    "steppe.averaging",
    "steppe.flatness",
    "steppe.testing",
    "steppe.compat",
    "steppe.papers",
    "steppe.integrations.lightning",
    "steppe.integrations.transformers",
    "steppe.integrations.accelerate",
    "steppe.integrations.keras",
    "steppe.integrations.peft",
    "steppe.experiments",
)

# Where torch documents what it defines elsewhere.
_SHORT = {
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.nn.parameter.Parameter": "torch.nn.Parameter",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
    "torch.distributed.distributed_c10d.ProcessGroup": "torch.distributed.ProcessGroup",
}


def public_names(module: ModuleType) -> list[str]:
    """Return the names that a module exports, without submodules: those of ``__all__``, or those defined in it."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name in vars(module) if name[0] != "_" and _defined_in(module, name)]
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def _defined_in(module: ModuleType, name: str) -> bool:
    return getattr(getattr(module, name), "__module__", None) == module.__name__


def documented() -> dict[str, dict[str, Any]]:
    """Return the objects to document: by module, then by name; each once, on the page of the first module with it."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for module_name in MODULES:
        module = import_module(module_name)
        objects = {name: getattr(module, name) for name in public_names(module)}
        found[module_name] = {name: value for name, value in objects.items() if id(value) not in seen}
        seen |= {id(value) for value in objects.values()}
    return found


def aliases() -> dict[str, str]:
    """Return the documented name for every other name of a public object: where it is defined, and where exported."""
    places = {id(value): f"{module}.{name}" for module, names in documented().items() for name, value in names.items()}
    found = {}
    for module_name in MODULES:
        module = import_module(module_name)
        for name in public_names(module):
            value = getattr(module, name)
            place = places[id(value)]
            found[f"{module_name}.{name}"] = place
            if hasattr(value, "__qualname__"):
                found[f"{value.__module__}.{value.__qualname__}"] = place
    return {name: place for name, place in found.items() if name != place}


def page(module_name: str, names: dict[str, Any]) -> str:
    """Return the page of a module, in reStructuredText, which autodoc reads."""
    lines = [module_name, "=" * len(module_name), "", f".. automodule:: {module_name}", "   :no-members:", ""]
    elsewhere = [name for name in public_names(import_module(module_name)) if name not in names]
    if elsewhere:
        links = ", ".join(f":obj:`~{module_name}.{name}`" for name in elsewhere)
        lines += [f"It also exports, from the pages before: {links}.", ""]
    lines += [".. autosummary::", "", *(f"   {name}" for name, value in names.items() if _has_docstring(value)), ""]
    for name, value in names.items():
        path = f"{module_name}.{name}"
        if _has_docstring(value) and inspect.isclass(value):
            lines += [f".. autoclass:: {path}", "   :members:", "   :inherited-members: " + _foreign_bases(value), ""]
        elif inspect.isroutine(value):
            lines += [f".. autofunction:: {path}", ""]
        else:
            lines += [f".. py:data:: {path}", "", f"   {data_text(name, value)}", ""]
    return "\n".join(lines)


def data_text(name: str, value: Any) -> str:
    """Return the text of an object without a docstring of its own: the string after its assignment.

    Raises:
        ValueError: There is none.
    """
    if isinstance(value, Paper):
        return f"{', '.join(value.authors)}: {value.title}. {value.year}.".replace("{", "").replace("}", "")
    for module in [m for n, m in sys.modules.items() if n.startswith("steppe.") and vars(m).get(name) is value]:
        text = ModuleAnalyzer.for_module(module.__name__).find_attr_docs().get(("", name))
        if text:
            return " ".join(text).strip()
    raise ValueError(f"the public {name} is not explained: write a string after its assignment")


def _has_docstring(value: Any) -> bool:
    return inspect.isroutine(value) or (inspect.isclass(value) and value.__module__.startswith("steppe"))


def _foreign_bases(value: type) -> str:
    """Return the bases whose members are not listed, because another project documents them."""
    return ", ".join(sorted({base.__name__ for base in value.__mro__ if not base.__module__.startswith("steppe")}))


def plain(module_name: str, names: dict[str, Any]) -> str:
    """Return the page of a module as Markdown: signatures and docstrings."""
    parts = [f"# {module_name}", inspect.getdoc(import_module(module_name)) or ""]
    for name, value in names.items():
        parts += [f"## {module_name}.{name}{_signature(value)}", _text(name, value)]
        if inspect.isclass(value):
            for member, attribute in vars(value).items():
                if member[0] != "_" and inspect.isroutine(attribute) and inspect.getdoc(attribute):
                    parts += [f"### {name}.{member}{_signature(attribute)}", _text(member, attribute)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _signature(value: Any) -> str:
    try:
        return re.sub(r"<(?:function|object) (\S+).*?>", r"\1", str(inspect.signature(value)))
    except (TypeError, ValueError):
        return ""


def _text(name: str, value: Any) -> str:
    return f"```text\n{inspect.getdoc(value)}\n```" if _has_docstring(value) else data_text(name, value)


def write_pages(app: Sphinx) -> None:
    """Write the pages that have changed to docs/api."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {f"{module}.rst": page(module, names) for module, names in documented().items()}
    for name, text in pages.items():
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text:
            (folder / name).write_text(text, encoding="utf-8")
    for stale in {path.name for path in folder.glob("*.rst")} - set(pages):
        (folder / stale).unlink()
    app.aliases = aliases()  # type: ignore[attr-defined]


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape the bars of formulas such as |e|, which reStructuredText takes for substitutions."""
    for i, line in enumerate(lines):
        if ">>>" not in line:
            parts = re.split(r"(``.*?``)", line)
            lines[i] = "".join(part if part.startswith("``") else re.sub(r"(?<!\\)\|", r"\\|", part) for part in parts)


def restore_first_words(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put words before a colon back into a sentence, which napoleon takes for the type of an attribute."""
    if what in ("attribute", "property", "data"):
        for i, line in enumerate(lines):
            if line.startswith(":type: "):
                del lines[i]
                lines[0] = f"{line.removeprefix(':type: ')}: {lines[0]}"
                return


def resolve_alias(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Link another name of a public object to the place where it is documented."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    if target in _SHORT:  # for intersphinx
        node["reftarget"] = _SHORT[target]
        return None
    parts = target.split(".")
    for i in range(len(parts), 0, -1):
        place = app.aliases.get(".".join(parts[:i]))  # type: ignore[attr-defined]
        if place is not None:
            path = ".".join([place, *parts[i:]])
            domain = env.get_domain("py")
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, contnode)
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the extension."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", restore_first_words, priority=600)  # after napoleon
    app.connect("missing-reference", resolve_alias, priority=400)  # before intersphinx
    return {"parallel_read_safe": True}
