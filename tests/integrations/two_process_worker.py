"""The script that each of two processes runs for test_accelerate_two_processes.py; it saves its results."""

import gc
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from accelerate_state import train_epoch
from tiny_transformer import arguments, gpt, tokens
from torch import nn

import steppe
from steppe.integrations.accelerate import passes
from steppe.integrations.transformers import SAMTrainer


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def samples(n: int = 12) -> torch.utils.data.TensorDataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, torch.randint(2, (n,), generator=g))


def sam(model) -> steppe.SAM:
    return steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), rho=0.5, model=model)


def prepared(**options):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, **options)
    model = mlp()
    return accelerator, *accelerator.prepare(model, sam(model), torch.utils.data.DataLoader(samples(), batch_size=2))


def one_perturbation_for_all() -> dict[str, torch.Tensor]:
    accelerator, model, optimizer, loader = prepared(gradient_accumulation_steps=2)
    for _ in range(2):
        train_epoch(accelerator, model, optimizer, loader)
    return accelerator.unwrap_model(model).state_dict()


def perturbation_for_each_micro_batch(**plugin) -> dict[str, torch.Tensor]:
    accelerator, model, optimizer, loader = prepared(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, **plugin)
    )
    for x, y in loader:
        with accelerator.accumulate(model):
            for sam_pass in passes(accelerator, optimizer, accumulate=True):
                with sam_pass:
                    accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model).state_dict()


def error_without_synchronization() -> str:
    try:
        perturbation_for_each_micro_batch()
    except RuntimeError as error:
        return str(error)
    return "no error"


def trainer(folder: Path, model: nn.Module, **method) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    args = arguments(folder, gradient_accumulation_steps=2, max_grad_norm=0.5, ddp_backend="gloo")
    trained = SAMTrainer(model=model, args=args, train_dataset=tokens(12), rho=0.1, log_sharpness=True, **method)
    trained.train()
    return model.state_dict(), trained.state.log_history


def trainer_on_adapters(folder: Path) -> dict[str, torch.Tensor]:
    from tiny_peft import adapted

    from steppe.integrations.peft import merged_sam

    return trainer(folder, adapted(dropout=0.0), method=merged_sam)[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {
        "for all": one_perturbation_for_all(),
        "for each": perturbation_for_each_micro_batch(sync_each_batch=True),
        "error": error_without_synchronization(),
    }
    results["trainer"], results["logs"] = trainer(folder, gpt(dropout=0.0).double())
    if importlib.util.find_spec("peft"):
        results["adapters"] = trainer_on_adapters(folder)
    rank = torch.distributed.get_rank()
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    gc.collect()  # a DistributedDataParallel in a reference cycle keeps threads that may abort Python at its end
