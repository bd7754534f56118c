"""Random numbers that depend on who draws, a seed, a step and a position alone.

So a resumed run goes on with the same draws, workers with the same seed draw alike, and no generator of the program is
touched: nothing has to be saved, replayed or protected.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steppe._tensors.dtensor import is_sharded, shard_like


def normal(who: str, seed: int, step: int, like: Sequence[Tensor]) -> list[Tensor]:
    """Return standard normal numbers, one tensor for each of ``like``, of its shape, dtype and device.

    >>> (x,), (y,) = normal("A", 0, 7, [torch.empty(2)]), normal("A", 0, 7, [torch.empty(2)])
    >>> torch.equal(x, y), torch.equal(x, normal("A", 0, 8, [torch.empty(2)])[0])
    (True, False)
    """
    return _drawn(who, seed, step, like, lambda t, g: _empty(t).normal_(generator=g))


def uniform(who: str, seed: int, step: int, like: Sequence[Tensor]) -> list[Tensor]:
    """Return uniform numbers from 0 to 1, one float32 tensor for each of ``like``, of its shape and device.

    In half precision there would be only a few hundred different ones.
    """
    return _drawn(
        who,
        seed,
        step,
        like,
        lambda t, g: torch.rand(t.shape, dtype=torch.float32, device=t.device, generator=g),
    )


def integers(who: str, seed: int, step: int, like: Sequence[Tensor], *, below: int) -> list[Tensor]:
    """Return whole numbers from 0 to ``below`` - 1, one int32 tensor for each of ``like``, of its shape and device."""
    return _drawn(
        who,
        seed,
        step,
        like,
        lambda t, g: torch.randint(below, t.shape, dtype=torch.int32, device=t.device, generator=g),
    )


def _drawn(
    who: str, seed: int, step: int, like: Sequence[Tensor], draw: Callable[[Tensor, torch.Generator | None], Tensor]
) -> list[Tensor]:
    """What each position draws of a whole tensor, cut to what this rank holds."""
    return [
        shard_like(draw(t, generator(t.device, key(who, seed, step, position))), t) for position, t in enumerate(like)
    ]


def _empty(like: Tensor) -> Tensor:
    """All of a tensor, though it may be sharded: what a rank draws must not depend on how many there are."""
    if is_sharded(like):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return torch.empty_like(like, requires_grad=False)


def key(who: str, seed: int, step: int, position: int) -> int:
    """Return 64 bits to seed a generator: a hash, so that neighbors draw independently, on every machine alike."""
    text = f"{who}/{seed}/{step}/{position}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(device: torch.device, key: int) -> torch.Generator | None:
    """Return a generator of our own; where only shapes are traced and a device is not there, a test puts None here."""
    return torch.Generator(device).manual_seed(key)
