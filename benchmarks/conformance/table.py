"""Render results.json as docs/conformance.md."""

from conformance.catalog import REMARKS

MARKS = {"holds": "✔", "fails": "✘", "limitation": "◐", "n/a": "–"}


def render(results: dict) -> str:
    """Return the table, notes on its cells, and a command for every statement that fails."""
    columns = {key: about for key, about in results["implementations"].items() if about["cells"]}
    parts = [
        head(results),
        table(results["statements"], columns),
        "A cell shows what was measured. ✔ the statement holds; ✘ it fails; ◐ it fails, and the implementation's own "
        "documentation states that ([below](#documented-limitations)); – it does not apply "
        "([reasons](#not-applicable)).",
        "## Remarks on the statements",
        bullets(f"**{id}** {REMARKS[id]}" for id in results["statements"] if id in REMARKS),
        "## How each implementation is used",
        "Each is used as in its own documentation, with its own helpers. If the documentation shows several ways, the "
        "one with the best results is used.",
        bullets(
            f"**{about['title']}** {about['version']} ([documentation]({link(about['docs'])})): {about['usage']}"
            + (f" {about['environment']}" if about["environment"] else "")
            for about in columns.values()
        ),
        "## Documented limitations",
        bullets(limitations(columns)),
        "## Not applicable",
        bullets(reasons(columns)),
        "## Errors",
        bullets(
            f"**{about['title']}**, {id}: `{cell['error']}`"
            for about in columns.values()
            for id, cell in about["cells"].items()
            if "error" in cell
        ),
        "## Left out",
        bullets(
            [
                *(
                    f"{about['title']} could not be measured: {about.get('failed', '')}"
                    for about in results["implementations"].values()
                    if not about["cells"]
                ),
                *results["left_out"],
            ]
        ),
        "## Reproduce a cell",
        "Each command sets up what it needs, prints the measured and the expected value, and exits 1. `PATH` is a "
        "checkout of github.com/davda54/sam. On Linux, pip installs the torch that is built for a GPU, which is large; "
        "with `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` it finds the one for a CPU.",
        *(
            f"<details><summary>{about['title']}</summary>\n\n```\n{chr(10).join(commands(about))}\n```\n\n</details>"
            for about in columns.values()
            if commands(about)
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(results: dict) -> str:
    """Return the introduction, with the machine and the date."""
    machine = results["machine"]
    return (
        "# Conformance\n\n"
        "The statements of [the contract](contract.md) about sharpness-aware minimization in a real training loop, "
        "measured for Steppe and for the other implementations that can be installed, by what a user observes. No "
        "statement uses an API of Steppe, and every number can be [reproduced](#reproduce-a-cell). Measured with\n\n"
        "```\npython benchmarks/conformance/run.py --classic PATH\n```\n\n"
        f"on {results['date']}, on {machine['cpu']}, Python {machine['python']}, torch {machine['torch']}. `PATH` is a "
        "checkout of github.com/davda54/sam, the classic single-file implementation."
    )


def table(statements: dict[str, str], columns: dict[str, dict]) -> str:
    """Return a table with one row per statement and one column per implementation."""
    titles = [
        f"{about['title']} {'' if key == 'classic' else about['version']}".strip() for key, about in columns.items()
    ]
    rows = [["", "statement", *titles], ["---", "---", *("---" for _ in titles)]]
    for id, sentence in statements.items():
        rows.append([f"**{id}**", sentence, *(mark(about["cells"][id]) for about in columns.values())])
    counts = [tally(about["cells"]) for about in columns.values()]
    rows.append(["", "**statements that hold / apply**", *counts])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def mark(cell: dict) -> str:
    """Return the text of a cell: the mark of its status, and the measured value."""
    measured = cell.get("measured", "") if cell["status"] != "n/a" else ""
    return f"{MARKS[cell['status']]} {measured}".strip()


def tally(cells: dict[str, dict]) -> str:
    """Return the number of statements that hold, and of those that apply."""
    states = [cell["status"] for cell in cells.values()]
    return f"**{states.count('holds')} / {len(states) - states.count('n/a')}**"


def limitations(columns: dict[str, dict]) -> list[str]:
    """Return the documented limitations, each once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for about in columns.values():
        for id, cell in about["cells"].items():
            if cell["status"] == "limitation":
                found.setdefault((about["title"], cell["reason"], cell["link"]), []).append(id)
    return [
        f"**{title}**, {', '.join(ids)}: {reason} ([source]({url}))." for (title, reason, url), ids in found.items()
    ]


def reasons(columns: dict[str, dict]) -> list[str]:
    """Return the reasons why statements do not apply, each once."""
    lines = []
    for about in columns.values():
        found: dict[str, list[str]] = {}
        for id, cell in about["cells"].items():
            if cell["status"] == "n/a":
                found.setdefault(cell["reason"], []).append(id)
        if found:
            text = "; ".join(f"{', '.join(ids)}: {reason}" for reason, ids in found.items())
            lines.append(f"**{about['title']}**: {text}.")
    return lines


def commands(about: dict) -> list[str]:
    """Return the commands that reproduce the failing cells."""
    return [cell["reproduce"] for cell in about["cells"].values() if "reproduce" in cell]


def link(docs: str) -> str:
    """Return a link from the page to a URL or a path of this repository."""
    return docs if docs.startswith("http") else f"../{docs}"


def bullets(lines) -> str:
    """Return a list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)
