"""Fill in the options that a recipe leaves open, for the machine that trains it."""

import torch

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.world import has_bfloat16, launched


def resolve(recipe: Recipe) -> Recipe:
    """Fill in the device, the precision, CUDA graphs and, on CPUs, the number of threads for this machine.

    Raises ExperimentError when the recipe needs a GPU and there is none, or has layers that cannot work here.
    """
    hardware = recipe.hardware
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise ExperimentError(
            f"device=cuda, but torch {torch.__version__} finds no CUDA device here: check its build and the driver, "
            "or use --device cpu"
        )
    if hardware.device == "cuda" or (hardware.device == "auto" and torch.cuda.is_available()):
        return fill_in(recipe.replace(device="cuda"))
    has_batch_norm = recipe.model.network != "vit" and recipe.model.norm == "batch" and not recipe.data.task
    if launched() > 1 and has_batch_norm:
        raise ExperimentError(
            "norm=batch in several processes on CPUs: each would normalize by its own part of the batch, and the "
            "SyncBatchNorm that prevents it exists on GPUs only; use --norm group"
        )
    threads = hardware.threads or 1  # so all machines of a kind give the same bits, and several runs fit on one
    narrow = [width for width in recipe.comparison.widths or (recipe.model.width,) if width % 16]
    if hardware.channels_last and threads > 1 and narrow and recipe.model.network != "vit":
        raise ExperimentError(
            f"channels_last with width={narrow[0]} on {threads} threads of a CPU: torch's backward of a strided 1x1 "
            "convolution then writes beyond its memory (seen with torch 2.13.0, wherever the number of channels is no "
            "multiple of 16 and that of images is odd). Use --threads 1, or a width that is a multiple of 16, or "
            "--no-channels-last"
        )
    return fill_in(recipe.replace(device="cpu", threads=threads))


def fill_in(recipe: Recipe) -> Recipe:
    """Fill in the precision and CUDA graphs of a recipe whose device is known."""
    hardware = recipe.hardware
    on_gpu = hardware.device == "cuda"
    return recipe.replace(
        amp=has_bfloat16(on_gpu=on_gpu) if hardware.amp is None else hardware.amp,
        cuda_graphs=on_gpu if hardware.cuda_graphs is None else hardware.cuda_graphs,
    )
