"""Preference tuning with TRL: DPO with LoRA, and SAM on the merged weights W = W0 + s B A.

pip install '.[transformers,peft]' trl
"""

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from steppe.integrations.peft import merged_sam
from steppe.integrations.transformers import SAMTrainerMixin


class SAMDPOTrainer(SAMTrainerMixin, DPOTrainer):
    """DPO with SAM; the same with SFTTrainer, KTOTrainer and RewardTrainer."""


torch.manual_seed(0)
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[EOS]", *map(str, range(30))])}))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")  # or AutoTokenizer
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))  # tiny; or AutoModelForCausalLM.from_pretrained(...)
pairs = [(f"{i} {i + 1} {i + 2}", f" {i + 3} {i + 4}", f" {i + 1} {i}") for i in range(24)]
data = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), zip(*pairs, strict=True), strict=True)))

quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "bf16": False, "dataloader_pin_memory": False}
args = DPOConfig("trl_dpo", num_train_epochs=5, learning_rate=1e-2, logging_strategy="epoch", **quiet)
lora = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
usual = {"model": model, "args": args, "train_dataset": data, "processing_class": tokenizer, "peft_config": lora}
trainer = SAMDPOTrainer(**usual, method=merged_sam, rho=0.05, log_sharpness=True)
trainer.train()

first, *_, last = [entry for entry in trainer.state.log_history if "sharpness" in entry]
for name in ("loss", "rewards/margins", "sharpness"):
    print(f"{name}: {first[name]:.3f} -> {last[name]:.3f}")
