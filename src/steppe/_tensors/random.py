"""Random numbers that depend only on a name (of the rule), a seed, a step, a micro-batch and a position.

A resumed run therefore continues with the same numbers, and workers with the same seed draw the same ones. No global
generator is used: it would have to be saved, replayed and protected from the second pass.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steppe._tensors.dtensor import is_sharded, shard_like


def normal(name: str, seed: int, step: int, like: Sequence[Tensor], *, micro_batch: int = 0) -> list[Tensor]:
    """Return standard normal numbers, one tensor for each of ``like``, of its shape, dtype and device.

    >>> (x,), (y,) = normal("A", 0, 7, [torch.empty(2)]), normal("A", 0, 7, [torch.empty(2)])
    >>> torch.equal(x, y), torch.equal(x, normal("A", 0, 8, [torch.empty(2)])[0])
    (True, False)
    """
    return _drawn(
        name,
        seed,
        step,
        like,
        lambda t, g: torch.empty(t.shape, dtype=t.dtype, device=t.device).normal_(generator=g),
        micro_batch,
    )


def uniform(name: str, seed: int, step: int, like: Sequence[Tensor], *, micro_batch: int = 0) -> list[Tensor]:
    """Return uniform numbers from 0 to 1, one float32 tensor for each of ``like``, of its shape and device.

    Always float32: in half precision there are only a few hundred different numbers.
    """
    return _drawn(
        name,
        seed,
        step,
        like,
        lambda t, g: torch.rand(t.shape, dtype=torch.float32, device=t.device, generator=g),
        micro_batch,
    )


def integers(name: str, seed: int, step: int, like: Sequence[Tensor], *, below: int) -> list[Tensor]:
    """Return integers from 0 to ``below`` - 1, one int32 tensor for each of ``like``, of its shape and device."""
    return _drawn(
        name,
        seed,
        step,
        like,
        lambda t, g: torch.randint(below, t.shape, dtype=torch.int32, device=t.device, generator=g),
    )


def _drawn(
    name: str,
    seed: int,
    step: int,
    like: Sequence[Tensor],
    draw: Callable[[Tensor, torch.Generator | None], Tensor],
    micro_batch: int = 0,
) -> list[Tensor]:
    """Draw a full, contiguous tensor for each position: the numbers depend on no layout, nor on the number of ranks."""
    return [
        _laid_out_like(t, draw(t, generator(t.device, key(name, seed, step, position, micro_batch))))
        for position, t in enumerate(like)
    ]


def _laid_out_like(like: Tensor, drawn: Tensor) -> Tensor:
    """Return what was drawn, sharded as ``like`` is, or in its memory format, in which it is added faster."""
    if is_sharded(like):
        return shard_like(drawn, like)
    if like.is_contiguous():
        return drawn
    return torch.empty_like(like, dtype=drawn.dtype, requires_grad=False).copy_(drawn)


def key(name: str, seed: int, step: int, position: int, micro_batch: int = 0) -> int:
    """Return 64 bits to seed a generator: a hash, so that neighbors are independent, and equal on every machine."""
    text = f"{name}/{seed}/{step}/{position}" + (f"/{micro_batch}" if micro_batch else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(device: torch.device, key: int) -> torch.Generator | None:
    """Return a new seeded generator. Tests on fake tensors, which have no device, replace this function."""
    return torch.Generator(device).manual_seed(key)
