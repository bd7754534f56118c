"""The script that each process runs for the test of Accelerate's FSDP2 on GPUs: it saves the weights after training."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate_state import train_epoch
from fsdp2_of_accelerate import prepared

from layouts import method, weights

if __name__ == "__main__":
    file, name = sys.argv[1:]
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20)
    accelerator = Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2)
    assert accelerator.is_fsdp2, accelerator.distributed_type
    model, optimizer, batches = prepared(accelerator, method(name))
    train_epoch(accelerator, model, optimizer, batches)
    trained = [w.cpu() for w in weights(model)]
    if accelerator.is_main_process:
        torch.save(trained, file)
    torch.distributed.destroy_process_group()
