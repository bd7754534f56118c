"""Copies of the weights that torch keeps in its own caches."""

import torch
from torch.nn.utils import parametrize


def drop_cached_weights() -> None:
    """Drop copies of the weights that torch has cached; call it after a change of weights that autograd does not see.

    Without it, a forward in an open autocast region or in ``parametrize.cached()`` runs on the weights before.
    """
    torch.clear_autocast_cache()  # low-precision casts in an open autocast region
    parametrize._cache.clear()  # of parametrize.cached(), a private name of torch that nothing else clears
