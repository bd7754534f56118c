"""Random damage to files, by seed: to their bytes, to the values in them, and to the fields of checkpoints."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_OTHERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, None, "text", "", True, -1, 0, 10**400, 1e300, [], {}, [[1]])
_ROOTS: tuple[Any, ...] = ([], {}, None, 3, "text", [[]], [None], {"format": None})


def mutate(path: Path, seed: int) -> str:
    """Damage a file in one way; return a description."""
    draw = random.Random(seed)
    if path.suffix == ".pt":
        ways: list[Callable[[Path, random.Random], str]] = [damage_bytes, damage_bytes, _fields, _fields, _fields]
    elif path.suffix in (".json", ".jsonl"):
        ways = [damage_bytes, _values, _values, _values]
    else:
        ways = [damage_bytes]
    return f"seed {seed}: {path.name}: {draw.choice(ways)(path, draw)}"


def damage_bytes(path: Path, draw: random.Random) -> str:
    """Flip, remove, overwrite or append bytes; return a description."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "flip", "truncate", "empty", "overwrite", "append", "deep"))
    place = draw.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del content[place:]
    elif kind == "empty":
        content.clear()
    elif kind == "overwrite":
        content[place : place + 64] = draw.randbytes(64)
    elif kind == "append":
        content += draw.randbytes(200)
    else:
        content[:] = b"[" * 100_000
    path.write_bytes(content)
    return f"{kind} at {place}"


def _values(path: Path, draw: random.Random) -> str:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    index = draw.randrange(len(lines))
    if len(lines) > 1 and draw.random() < 0.2:
        what = draw.choice(("without", "twice"))
        lines[index : index + 1] = [] if what == "without" else [lines[index]] * 2
    else:
        value = json.loads(lines[index])
        what = "another root" if draw.random() < 0.1 else _one_value(value, draw)
        lines[index] = json.dumps(draw.choice(_ROOTS) if what == "another root" else value)
    path.write_text("\n".join(lines) + "\n")
    return f"line {index} {what}"


def _one_value(root: Any, draw: random.Random) -> str:
    """Change, remove or rename one value somewhere inside."""
    place, value, name = root, root, ""
    while isinstance(value, list | dict) and value and (place is root or draw.random() < 0.9):
        place = value
        name = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value = place[name]
    if not isinstance(place, list | dict) or not place:
        return "nothing"
    kind = draw.choice(("replace", "replace", "number", "remove", "rename"))
    if kind == "number" and isinstance(value, int | float):
        place[name] = draw.choice((value + 1, 2 * value, -value, value * 1.0001))
    elif kind == "remove":
        del place[name]
    elif kind == "rename" and isinstance(place, dict):
        place[f"{name}_"] = place.pop(name)
    else:
        place[name] = draw.choice(_OTHERS)
    return f"{kind} {name!r}, {str(value)[:40]!r}"


def _fields(path: Path, draw: random.Random) -> str:
    """Change a field of a checkpoint and save it as torch does."""
    state = torch.load(path, weights_only=True)
    name = draw.choice(sorted(state))
    kind = draw.choice(("remove", "replace", "inside", "inside"))
    if kind == "remove":
        del state[name]
    elif kind == "inside" and isinstance(state[name], list | dict) and state[name]:
        kind = _one_value(state[name], draw)
    else:
        state[name] = draw.choice((*_OTHERS[:9], 1e300, [], {}, torch.zeros(3), torch.tensor(math.nan)))
    torch.save(state, path)
    return f"{kind} in {name}"
