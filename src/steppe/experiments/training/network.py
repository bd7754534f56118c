"""Build the network of a run, and check that a method can fine-tune it."""

from torch import nn
from torch.optim import Optimizer

from steppe.experiments.config.recipe import Run
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.models.preact_resnet import PreActResNet18


def build_network(run: Run, data: Dataset) -> nn.Module:
    """Build the network with its initial weights, drawn from torch's generator."""
    model = run.recipe.model
    if (data.backbone is None) != (model.backbone == "none"):
        raise RuntimeError(
            f"backbone={model.backbone}, but the data has {data.backbone}: load it by pretraining.with_backbone"
        )
    if data.backbone is not None:
        return data.backbone.network(freeze=model.freeze)
    return PreActResNet18(model.width, stem_stride=model.stem_stride, norm=model.norm)


def check_fine_tuning(run: Run, optimizer: Optimizer) -> None:
    """Raise ExperimentError where a method would silently ignore an option of fine-tuning."""
    perturbed = getattr(getattr(optimizer, "perturbation", None), "parameters", ())
    if perturbed and not any(p.requires_grad for p in perturbed):
        raise ExperimentError(
            f"{run.name} perturbs weights that --freeze keeps fixed, so it would be the plain base optimizer at twice "
            "the cost: leave --freeze or this method out"
        )
    head_lr = run.recipe.training.head_lr
    if head_lr is not None and all(group["lr"] != head_lr for group in optimizer.param_groups):
        raise ExperimentError(
            f"{run.name} has one learning rate of its own, and head_lr={head_lr} would be ignored: leave --head-lr or "
            "this method out"
        )
