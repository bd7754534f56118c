"""Random generators for the data, independent of each other and of torch's global one."""

import torch
from numpy.random import SeedSequence

# One number for each purpose, so that the draws of one seed are independent.
FEW_SHOT, LABEL_NOISE, FLATNESS_SAMPLE = 0x5407, 0x401E, 0xF1A7


def generator(seed: int, purpose: int) -> torch.Generator:
    """Return a CPU generator that depends on `seed` and `purpose` alone."""
    # torch's CPU generator keeps 32 bits of its seed: (seed << 32) + purpose would give the same draws for every seed
    mixed = int(SeedSequence((seed, purpose)).generate_state(1)[0])
    return torch.Generator().manual_seed(mixed)
