"""Render the cards of the methods as Markdown, for `steppe methods` and docs/methods.

All measured numbers come from measured.json, which scripts/make_cards.py writes.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from steppe.methods._absent import absent_methods
from steppe.methods._card import VERIFIED, MethodCard, plain_base
from steppe.methods.registry import CARDS
from steppe.papers import SAM as SAM_PAPER
from steppe.papers import Paper

__all__ = ["card", "index", "measured", "memory"]

_WIDTH = 120
_BATCH_NORM = (
    "With `model=`, BatchNorm's running statistics see one pass per step. Most authors' code lets them see every pass, "
    "and the numbers of the papers were made so: after 20 steps, the running mean differs by 0.05 and the variance by "
    "0.09."
)


@cache
def measured() -> Mapping[str, Any]:
    """Return the measured ``memory`` of the methods, and their ``comparisons`` on Fashion-MNIST."""
    found: dict[str, Any] = json.loads(
        (resources.files("steppe.methods") / "measured.json").read_text(encoding="utf-8")
    )
    return MappingProxyType(found)


def card(name: str) -> str:
    """Return the card of a method as Markdown.

    Raises:
        KeyError: There is no method of this name.

    Example:
        >>> print(card("gsam").splitlines()[0])
        # GSAM
    """
    method = CARDS[name]
    lines = [f"# {method.label}", "", *_wrap(method.summary), "", "```", *method.equation.splitlines(), "```", ""]
    lines += _wrap(f"**When to use it.** {method.when}")
    lines += ["", *_wrap(f"**When not to use it.** {method.when_not}"), ""]
    lines += ["```python", *method.usage.splitlines(), "```", ""]
    lines += ["## Hyperparameters", "", *_hyperparameters(method), ""]
    lines += ["## Cost and memory", "", *_cost(method), ""]
    lines += ["## Measured", "", *_results(method), ""]
    lines += ["## Checked against", "", *_wrap(f"{VERIFIED[method.verified]} {method.checked}"), ""]
    caveats = [*method.caveats, *([_BATCH_NORM] if _has_second_pass(method) else [])]
    lines += ["## Caveats", "", *(line for caveat in caveats for line in _item(caveat)), ""]
    own = [paper for paper in method.papers if paper != SAM_PAPER] or [SAM_PAPER]
    lines += ["## Citation", "", *(line for paper in own for line in _item(_reference(paper)))]
    lines += ["", f"BibTeX of all papers that this method builds on: `steppe methods {name} --bibtex`", ""]
    return "\n".join(lines)


def _has_second_pass(method: MethodCard) -> bool:
    passes = method.passes_with()
    acts_in_loss = method.comparison is not None and method.comparison.build is plain_base
    return not acts_in_loss and (passes is None or passes > 1)


def index() -> str:
    """Return the table of all methods and all measurements on Fashion-MNIST as Markdown."""
    lines = ["# Methods", ""]
    lines += _wrap(
        "One card per method: its update, its cost, what it was compared with, and the results measured here, good or "
        "bad. `steppe methods` shows the same in the terminal. Cost is in passes (forward and backward over the batch) "
        "per step. Memory is the peak within a step beyond that of the base, in units of the weights' size."
    )
    lines += [
        "",
        *_wrap(
            "The column *on Fashion-MNIST* has the test accuracy and the generalization gap on a sample of it, "
            "[below](#measured-on-fashion-mnist): what differs beyond chance from the base optimizer and from SAM. "
            "[What SAM buys](../evidence/README.md) has more seeds and other data for a few methods, whose cards say "
            "so. Every method is compared with a float64 reference in its paper's notation. The next column says with "
            "what else: *same steps* means that other code was run, and *read* that it was not."
        ),
        "",
        "| method | cost | memory | when to use it | on Fashion-MNIST | verified against | paper |",
        "|---|---|---:|---|---|---|---|",
    ]
    for name, method in CARDS.items():
        cells = (
            f"[{method.label}]({name}.md)",
            method.cost,
            memory(name),
            method.when,
            evidence(method),
            method.verified,
            f"[{method.paper.short}]({method.paper.url})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Memory", "", *_memory_source(), "", "## Measured on Fashion-MNIST", ""]
    for number, run in enumerate(measured()["comparisons"]):
        lines += [*([""] if number else []), *_comparison(run)]
    if not measured()["comparisons"]:
        lines.append("Not yet measured.")
    lines += ["", "## Not here, and why", "", *(line for reason in absent_methods() for line in _item(reason))]
    lines += ["", "The pages of this folder are generated: `python scripts/make_cards.py`.", ""]
    return "\n".join(lines)


def evidence(method: MethodCard) -> str:
    """Return what was measured on Fashion-MNIST: the differences beyond chance from the base and from SAM.

    Example:
        >>> from steppe.methods.msam import CARD
        >>> for labels in evidence(CARD).split("; "):
        ...     print(labels)
        correct labels, 3 runs: no difference beyond chance
        40 % wrong labels, 3 runs: test accuracy better than the base and worse than SAM
    """
    found = []
    for run in measured()["comparisons"]:
        own = [one for one in run["differences"] if method.covers(one["method"])]
        references = {run["base"]: "the base", run["sam"]: "SAM"}
        verdicts = []
        for value, words in _compared(run).items():
            decided = [one for one in own if one[value]["verdict"] in ("better", "worse")]
            against = [f"{one[value]['verdict']} than {references[one['reference']]}" for one in decided]
            if against:
                verdicts.append(f"{words} {' and '.join(against)}")
        if own:
            runs = min(one["test_accuracy"]["n"] for one in own)
            none = "no verdict" if runs == 1 else "no difference beyond chance"
            found.append(f"{run['labels']}, {runs} run{'s'[: runs > 1]}: {', '.join(verdicts) or none}")
    return "; ".join(dict.fromkeys(found)) or "not measured"  # comparisons that say the same are named once


def memory(name: str) -> str:
    """Return the peak memory of a step beyond that of the base, in units of the weights' size."""
    found = (measured()["memory"] or {"methods": {}})["methods"].get(name)
    return "?" if found is None else f"{found['within']:.1f}"


def _hyperparameters(method: MethodCard) -> Iterator[str]:
    if not method.usual:
        yield "None."
        return
    yield from ("| argument | default here | usual values |", "|---|---:|---|")
    for name, usual in method.usual.items():
        default = method.defaults.get(name, "required")
        yield f"| `{name}` | {default} | {usual} |"


def _cost(method: MethodCard) -> Iterator[str]:
    usual = method.passes_with()
    default = "" if usual is None or not callable(method.passes) else f", {usual:.3g} with the defaults"
    yield from _wrap(f"Passes per step: {method.cost}{default}. Memory: {method.memory}.")
    found = (measured()["memory"] or {"methods": {}})["methods"].get(method.name)
    yield ""
    if found is None:
        yield "Memory not yet measured."
        return
    yield from _wrap(
        "[Measured](README.md#memory) beyond the memory of the base, in units of the weights' size: "
        f"{found['within']:.2f} at the peak of a step, of which {found['between']:.2f} are kept from step to step."
    )


def _memory_source() -> Iterator[str]:
    found = measured()["memory"]
    if found is None:
        yield "Not yet measured."
        return
    yield from _wrap(
        f"Counted by `{found['command']}` on {found['date']} with torch {found['torch']}, beyond the memory of "
        f"{found['base']}, on a network whose activations are negligible. The number of bytes is exact and does not "
        "depend on the machine. The peak includes temporary tensors that the cards do not list: those of e and of the "
        "update gradient, and parts of the weights that are computed at a time, of at most 20 MiB, which is 0.6 of "
        "this network's weights and less of a larger one's (also for `report()`, which measures Late SAM's first "
        "perturbed step when the base already has its momentum). Methods for adapters: a network of twice the width "
        "whose weights are frozen, beyond SGD with momentum on its adapters of rank 8; one of its eight layers is 0.12 "
        "of the weights."
    )


def _results(method: MethodCard) -> Iterator[str]:
    shown: set[str] = set()
    for run in measured()["comparisons"]:
        own = [row for row in run["rows"] if method.covers(row["method"])]
        if not own or run["setting"] in shown:  # SAM is in every comparison of a setting
            continue
        if shown:
            yield ""
        shown.add(run["setting"])
        others = [row for row in run["rows"] if row["method"] in (run["base"], run["sam"]) and row not in own]
        yield from _wrap(f"{_conditions(run)} [All methods, and the command.](README.md#measured-on-fashion-mnist)")
        yield from ("", *_table([*others, *own]), "")
        for difference in run["differences"]:
            if method.covers(difference["method"]):
                yield from _item(_sentence(run, difference))
        if any(method.covers(difference["method"]) for difference in run["differences"]):
            yield from _item("These verdicts and intervals are corrected for all methods of that comparison.")
    if method.needs_adapters:
        yield from _wrap(
            "The recipe for Fashion-MNIST trains networks without adapters, so that its accuracies do not apply here."
        )
    elif not shown:
        yield "Not yet measured on Fashion-MNIST."
    if method.other_measurements:
        yield from ("", "In other experiments, with more seeds or other data:", "")
        yield from (line for result in method.other_measurements for line in _item(result))


def _comparison(run: Mapping[str, Any]) -> Iterator[str]:
    yield from _wrap(_conditions(run))
    yield from ("", "```", run["command"], "```", "", *_table(run["rows"]))
    labels = {row["method"]: row["label"] for row in run["rows"]}
    references = [one for one in dict.fromkeys((run["base"], run["sam"])) if one is not None]
    differences = {(d["method"], d["reference"]): d for d in run["differences"]}
    if not differences:
        return
    yield from ("", *_wrap("The differences, paired by seed, in points with 95 % intervals:"), "")
    compared = _compared(run)
    heads = [f"{words} against {labels[one]}" for one in references for words in compared.values()]
    yield "| method | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for method in labels:
        pairs = [differences.get((method, one)) for one in references]
        if any(pairs):
            cells = ["" if d is None else _short(d[of]) for d in pairs for of in compared]
            yield f"| {' | '.join([labels[method], *cells])} |"
    yield ""
    yield from _wrap(
        "The intervals of a column hold for all of its methods at once with 95 %, and where no method differs, any is "
        "called better or worse in at most 5 % of such columns. Of many methods with three runs each, only large "
        "differences are found."
    )


def _compared(run: Mapping[str, Any]) -> Mapping[str, str]:
    """Return what the verdicts of a comparison are about, and its name: with wrong labels there is none on the gap."""
    names = {"test_accuracy": "test accuracy", "gap": "gap"}
    return {of: name for of, name in names.items() if all(of in difference for difference in run["differences"])}


def _conditions(run: Mapping[str, Any]) -> str:
    environment = run["environment"]
    threads = environment.get("threads")
    machine = environment["gpu"] or f"{threads} thread{'s'[: threads != 1]} of {environment['cpu']}"
    return (
        f"{run['setting']}; {run['standardized_epochs']} standardized epochs each (equal compute), the same seeds for "
        f"all; {machine}, torch {environment['torch']}, steppe {environment['steppe']}, {environment['date'][:10]}."
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = {
        "train_accuracy": "train accuracy %",
        "test_accuracy": "test accuracy %",
        "corrupted_accuracy": "corrupted images %",
        "gap": "gap, points",
    }
    shown = [name for name in columns if any(name in row for row in rows)]
    heads = ["method", "rho", "passes per step", *(columns[name] for name in shown), "runs"]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" + "|---:" * (len(heads) - 1) + "|"
    for row in rows:
        rho = "" if row["rho"] is None else f"{row['rho']:g}"
        values = [_text(row[name]) if name in row else "" for name in shown]
        cells = [row["label"], rho, f"{row['passes']['mean']:.2f}", *values, str(row["test_accuracy"]["n"])]
        yield "| " + " | ".join(cells) + " |"


def _sentence(run: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    labels = {row["method"]: row["label"] for row in run["rows"]}
    decided = "; ".join(f"{words} {_verdict(difference[of])}" for of, words in _compared(run).items())
    return (
        f"{labels[difference['method']]} against {labels[difference['reference']]}, {difference['test_accuracy']['n']} "
        f"paired runs: {decided}."
    )


def _text(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.2f}" + ("" if value["sd"] is None else f"±{value['sd']:.2f}")


def _verdict(value: Mapping[str, Any]) -> str:
    if value["interval_95"] is None:
        return f"{value['mean']:+.2f} points (one run: {value['verdict']})"
    low, high = value["interval_95"]
    return f"{value['mean']:+.2f} points, 95 % interval [{low:+.2f}, {high:+.2f}]: {value['verdict']}"


def _short(value: Mapping[str, Any]) -> str:
    if value["interval_95"] is None:
        return f"{value['mean']:+.2f}"
    low, high = value["interval_95"]
    word = f" {value['verdict']}" if value["verdict"] in ("better", "worse") else ""
    return f"{value['mean']:+.2f} [{low:+.2f}, {high:+.2f}]{word}"


def _reference(paper: Paper) -> str:
    title = paper.title.replace("{", "").replace("}", "")
    return f"{paper.short.partition(' arXiv')[0]} *{title}*, [arXiv:{paper.arxiv}]({paper.url})"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)


def _item(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
