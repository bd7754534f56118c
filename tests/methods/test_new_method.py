"""A new method is one new file: the example of docs/extending.md, in a copy of the package, is found everywhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each command is a process of its own

ROOT = Path(__file__).parents[2]
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
METHOD = re.search(r'^```python\n("""MeanSAM: .*?)^```', EXTENDING, flags=re.DOTALL | re.MULTILINE).group(1)
ITS_TESTS = re.search(r"^```py\n(.*?)^```", EXTENDING, flags=re.DOTALL | re.MULTILINE).group(1)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of src with one more file."""
    source = tmp_path_factory.mktemp("package") / "src"
    shutil.copytree(ROOT / "src" / "steppe", source / "steppe", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "steppe" / "methods" / "my_new_method.py").write_text(METHOD, encoding="utf-8")
    return source


def run(package: Path, *words: str, cwd: Path = ROOT) -> str:
    environment = os.environ | {"PYTHONPATH": str(package), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_new_method_is_listed_and_has_a_card_and_a_citation(package):
    assert re.search(r"^my_new_method +2 ", run(package, "-m", "steppe", "methods"), flags=re.MULTILINE)
    card = run(package, "-m", "steppe", "methods", "my_new_method")
    assert "MeanSAM" in card
    assert "Update with a mean of the gradients at w and at w + e." in " ".join(card.split())
    assert "@misc{lovelace2026mean," in run(package, "-m", "steppe", "methods", "my_new_method", "--bibtex")


def test_new_method_is_in_variants_and_in_the_citation_of_its_optimizer(package):
    lines = [
        "import torch, steppe",
        "base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)",
        "optimizer = steppe.variants.my_new_method(base, beta=0.25)",
        "print(optimizer.combination)",
        "print(steppe.citation(optimizer))",
    ]
    out = run(package, "-c", "\n".join(lines))
    assert "MeanGradient(beta=0.25)" in out
    assert "title = {The Mean of Two Gradients}" in out


def test_new_method_is_trained_by_compare(package, tmp_path):
    options = ["--epochs", "1", "--seeds", "1", "--width", "2", "--dataset", "sample", "--out", "run", "--rho", "0.1"]
    out = run(package, "-m", "steppe", "compare", *options, "--methods", "sgd", "my_new_method:beta=0.25", cwd=tmp_path)
    assert "MeanSAM (beta 0.25)" in out


def test_new_method_has_the_tests_of_all_methods_and_its_own(package, tmp_path):
    tests = tmp_path / "test_my_new_method.py"
    tests.write_text(ITS_TESTS, encoding="utf-8")
    shared = ["tests/methods/test_named_methods.py", "tests/methods/test_cards.py", "tests/methods/test_registry.py"]
    words = ["-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", "pyproject.toml"]
    out = run(package, *words, "-k", "my_new_method or MeanGradient or beta_one", str(tests), *shared)
    assert int(re.search(r"(\d+) passed", out).group(1)) > 30
