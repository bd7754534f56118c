"""A small vision transformer under the Hugging Face Trainer with SAM: handwritten digits, in patches of 2 x 2.

pip install '.[transformers]' scikit-learn
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from steppe.integrations.transformers import SAMTrainer

set_seed(0)
images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]
train, test = rows[:1280], rows[1280:]
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
model = ViTForImageClassification(ViTConfig(**sizes, **shape, initializer_range=0.2))

forwards = []
model.register_forward_hook(lambda module, *_: forwards.append(1) if module.training else None)

with tempfile.TemporaryDirectory() as folder:
    trainer = SAMTrainer(  # instead of Trainer; method=steppe.variants.asam for another method
        rho=0.02,
        log_sharpness=True,
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            num_train_epochs=6,
            per_device_train_batch_size=64,
            learning_rate=5e-3,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]

sharpness = [entry["sharpness"] for entry in trainer.state.log_history if "sharpness" in entry]
print(f"{trainer.state.global_step} steps, {len(forwards) / trainer.state.global_step:.2f} passes each")
print("L(w + e) - L(w) by epoch:", " ".join(f"{s:.4f}" for s in sharpness))
print(f"test accuracy {accuracy:.2%} on {len(test)} digits")
