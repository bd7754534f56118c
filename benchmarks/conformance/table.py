"""results.json as a page."""

from conformance.catalogue import REMARKS

MARKS = {"green": "✔", "red": "✘", "limit": "◐", "n/a": "–"}
STEPPE = "steppe"


def render(results: dict) -> str:
    """Write the table, what is behind its cells, and a command for every cell that is not green."""
    columns = {key: about for key, about in results["implementations"].items() if about["cells"]}
    parts = [
        head(results),
        table(results["statements"], columns),
        "A cell says what was measured. ✔ the statement holds; ✘ it does not; ◐ it does not, and the implementation's "
        "own documentation says so ([below](#limits-in-their-own-words)); – it has no meaning there "
        "([why](#where-a-statement-has-no-meaning)).",
        "## The statements, closer",
        bullets(f"**{id}** {REMARKS[id]}" for id in results["statements"] if id in REMARKS),
        "## How each is used",
        "As its own documentation shows, with its own helpers; of several ways, in the one that does best.",
        bullets(
            f"**{about['title']}** {about['version']} ([documentation]({link(about['docs'])})): {about['usage']}"
            + (f" {about['environment']}" if about["environment"] else "")
            for about in columns.values()
        ),
        "## Limits, in their own words",
        bullets(limits(columns)),
        "## Where a statement has no meaning",
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
                    f"{about['title']} could not be run here: {about.get('failed', '')}"
                    for about in results["implementations"].values()
                    if not about["cells"]
                ),
                *results["left_out"],
            ]
        ),
        "## Reproduce a cell",
        "Each command sets up what it needs, prints what it measures and what was expected, and exits 1. `PATH` is a "
        "checkout of github.com/davda54/sam. On Linux, pip takes the torch that is built for a GPU, which is large; "
        "`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` offers it the one for a CPU.",
        *(
            f"<details><summary>{about['title']}</summary>\n\n```\n{chr(10).join(commands(about))}\n```\n\n</details>"
            for about in columns.values()
            if commands(about)
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(results: dict) -> str:
    """Say what the page is, and what was run where."""
    machine = results["machine"]
    return (
        "# Conformance\n\n"
        "What [the contract](architecture.md#the-contract) asks of sharpness-aware minimization in a real training "
        "loop, as behavior that a user meets, run over Steppe and over the other implementations that can be "
        "installed. No statement names an API of Steppe, and every number can be [reproduced](#reproduce-a-cell). "
        "Made by\n\n"
        "```\npython benchmarks/conformance/run.py --classic PATH\n```\n\n"
        f"on {results['date']}, on {machine['cpu']}, Python {machine['python']}, torch {machine['torch']}. `PATH` is a "
        "checkout of github.com/davda54/sam, the classic single-file implementation."
    )


def table(statements: dict[str, str], columns: dict[str, dict]) -> str:
    """Write one row a statement, one column an implementation."""
    titles = [
        f"{about['title']} {'' if key == 'classic' else about['version']}".strip() for key, about in columns.items()
    ]
    rows = [["", "statement", *titles], ["---", "---", *("---" for _ in titles)]]
    for id, sentence in statements.items():
        rows.append([f"**{id}**", sentence, *(mark(about["cells"][id]) for about in columns.values())])
    counts = [tally(about["cells"]) for about in columns.values()]
    rows.append(["", "**holds / of those that apply**", *counts])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def mark(cell: dict) -> str:
    """Write a cell."""
    said = cell.get("measured", "") if cell["status"] != "n/a" else ""
    return f"{MARKS[cell['status']]} {said}".strip()


def tally(cells: dict[str, dict]) -> str:
    """Count green cells, and those that apply."""
    states = [cell["status"] for cell in cells.values()]
    return f"**{states.count('green')} / {len(states) - states.count('n/a')}**"


def limits(columns: dict[str, dict]) -> list[str]:
    """List what peers say of themselves, each once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for about in columns.values():
        for id, cell in about["cells"].items():
            if cell["status"] == "limit":
                found.setdefault((about["title"], cell["why"], cell["link"]), []).append(id)
    return [f"**{title}**, {', '.join(ids)}: {why} ([source]({url}))." for (title, why, url), ids in found.items()]


def reasons(columns: dict[str, dict]) -> list[str]:
    """List why cells are empty, each reason once."""
    lines = []
    for about in columns.values():
        found: dict[str, list[str]] = {}
        for id, cell in about["cells"].items():
            if cell["status"] == "n/a":
                found.setdefault(cell["why"], []).append(id)
        if found:
            said = "; ".join(f"{', '.join(ids)}: {why}" for why, ids in found.items())
            lines.append(f"**{about['title']}**: {said}.")
    return lines


def commands(about: dict) -> list[str]:
    """List the commands behind the cells that are not green."""
    return [cell["reproduce"] for cell in about["cells"].values() if "reproduce" in cell]


def link(docs: str) -> str:
    """Turn a path of this repository into one from the page."""
    return docs if docs.startswith("http") else f"../{docs}"


def bullets(lines) -> str:
    """Write a list."""
    return "\n".join(f"- {line}" for line in lines)
