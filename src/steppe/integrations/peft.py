"""PEFT: methods for LoRA, which act on the merged weights W = W0 + s B A, or on the balance of A and B.

:class:`steppe.SAM` and all of :mod:`steppe.variants` work on the parameters of any adapter. The functions of this
module need LoRA:

- :func:`merged_sam`: perturbs W along its gradient, in two passes.
- :func:`flat_lora`: perturbs W by random noise, in a single pass.
- :func:`bar`: scales A and B against each other, as SAM on them would, in a single pass without a perturbation.
"""

try:
    import peft  # noqa: F401
except ImportError as missing:
    raise ImportError(
        "steppe.integrations.peft needs PEFT, which is not installed: pip install 'steppe[peft]'"
    ) from missing

from steppe.methods._merged_weights import MergedWeightMethod
from steppe.methods.bar import BAR, BAR_PAPER, bar
from steppe.methods.flat_lora import FLAT_LORA_PAPER, MergedNoise, flat_lora
from steppe.methods.merged_sam import MergedGradient, merged_sam

__all__ = [
    "BAR",
    "BAR_PAPER",
    "FLAT_LORA_PAPER",
    "MergedGradient",
    "MergedNoise",
    "MergedWeightMethod",
    "bar",
    "flat_lora",
    "merged_sam",
]
