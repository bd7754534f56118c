"""The command line: `steppe compare`, `finetune`, `tune`, `measure`, `plot`, `methods`.

Exit codes: 0 success; 1 an error, printed in one line; 2 a wrong command line; 130 Ctrl-C.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib import metadata

__all__ = ["main"]

_EXTRA = frozenset({"matplotlib", "numpy", "plotly", "rich", "tyro"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (by default those of the process) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"steppe {metadata.version('steppe')}")
        return 0
    try:
        return _run(_with_default(words))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        return _fail(f"{error.name} is not installed, and experiments need it: pip install 'steppe[experiments]'")


def _with_default(words: Sequence[str]) -> list[str]:
    """Insert the default recipe.

    >>> _with_default(["compare", "--seeds", "3"])
    ['compare', 'demo', '--seeds', '3']
    """
    if words[:1] not in (["compare"], ["tune"]) or words[1:2] in (["-h"], ["--help"]):
        return list(words)
    return [words[0], "demo", *words[1:]] if not words[1:] or words[1].startswith("-") else list(words)


def _run(words: Sequence[str]) -> int:
    # imported here, so that main() can report missing libraries of the extra `experiments`
    from rich.console import Console

    from steppe.experiments.commands import parse
    from steppe.experiments.errors import ExperimentError
    from steppe.experiments.training.stopping import Stopped

    try:
        parse(words).run(["steppe", *words], Console())
    except Stopped as stopped:
        return _stopped(words, 128 + stopped.signal)
    except KeyboardInterrupt:
        return _stopped(words, 130)
    except ExperimentError as error:
        return _fail(str(error))
    except OSError as error:  # a full disk, a folder without write permission: the system's message is clear
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    return 0


def _stopped(words: Sequence[str], code: int) -> int:
    from steppe.experiments.world import launched

    start = f"torchrun --nproc-per-node {launched()} -m steppe" if launched() > 1 else "steppe"
    print(f"\nStopped. To resume: {start} {shlex.join(words)}", file=sys.stderr)
    return code


def _fail(message: str) -> int:
    print(f"steppe: {message}", file=sys.stderr)
    return 1
