"""benchmarks/gpu/table.py: trainings as Markdown."""

from gpu import table
from results import Result
from steppe.experiments.config.recipe import Recipe


def test_precisions_are_compared_in_pairs():
    record = {"standardized_epoch": 2, "epoch": 2, "steps": 1, "gradient_evaluations": 1, "passes": 1.0}
    record |= {"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 1.0, "seconds": 1.0, "images_per_second": 1.0}
    accuracies = {
        ("bfloat16", 0): 90.0,
        ("bfloat16", 1): 92.0,
        ("float32", 0): 89.5,
        ("float32", 1): 91.5,
        ("float32", 2): 10.0,
    }
    runs = [
        {
            "setting": setting,
            "method": "sgd",
            "seed": seed,
            "records": [record | {"test_accuracy": accuracy, "gap": 99.0 - accuracy}],
        }
        for (setting, seed), accuracy in accuracies.items()
    ]
    runs.append({"setting": "bfloat16", "method": "sgd", "seed": 2, "failed": "it diverged"})
    recipe = Recipe().replace(methods=("sgd",), seeds=3, epochs=2).to_json()
    data = {"recipes": {"bfloat16": recipe, "float32": recipe}, "runs": runs, "seconds": 60.0, "fewer_epochs": None}
    text = table.precision([Result("precision", "a device", False, "2026-11-23", "run.py", "2.13.0", {}, data)])
    assert (
        "| SGD | 91.00±1.41 | 90.50±1.41 | +0.50 [+0.50, +0.50] | 8.00±1.41 | 8.50±1.41 | -0.50 [-0.50, -0.50] | 2 |"
        in text
    )
    assert "After 2 standardized epochs, 2 of 2 differences have a 95 % interval that excludes 0." in text
    assert "- Failed: sgd-seed2: it diverged" in text
