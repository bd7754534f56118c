"""Fine-tuning with LoRA: PEFT, the Hugging Face Trainer, and SAM on the merged weights W = W0 + s B A.

pip install '.[transformers,peft]'
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from steppe.integrations.peft import merged_sam
from steppe.integrations.transformers import SAMTrainer

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))  # tiny; or AutoModelForCausalLM.from_pretrained(...)
config = LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", modules_to_save=["lm_head"])
model = get_peft_model(model, config)

text = torch.tensor(list(argparse.__doc__.encode())).split(32)[:-1]  # one token a byte; or your data set
data = [{"input_ids": row, "labels": row} for row in text]
args = TrainingArguments(
    num_train_epochs=8,
    learning_rate=1e-2,
    logging_strategy="epoch",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
trainer = SAMTrainer(model=model, args=args, train_dataset=data, method=merged_sam, rho=0.05, log_sharpness=True)
trainer.train()

logs = [entry for entry in trainer.state.log_history if "sharpness" in entry]
print(f"loss {logs[0]['loss']:.2f} -> {logs[-1]['loss']:.2f}, L(W + e) - L(W) = {logs[-1]['sharpness']:.3f} at the end")
merged = model.merge_and_unload()  # W0 + s B A
