"""Contract C37: `import steppe` is cheap beside `import torch`. Modules are counted, because times vary."""

import json
import subprocess
import sys

import steppe

COST = """
import json, sys, torch
before = set(sys.modules)
import steppe
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# statistics and fractions: the standard library's, with what they import
STANDARD_LIBRARY = {"fractions", "statistics", "_statistics"}


def test_c37_import_loads_little_beside_torch():
    result = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True)
    modules = json.loads(result.stdout)
    others = [name for name in modules if not name.startswith("steppe")]
    assert set(others) <= STANDARD_LIBRARY, "torch._dynamo, sympy, numpy, ... belong to the functions that use them"
    packages = {name.split(".")[1] for name in modules if "." in name and name.startswith("steppe")}
    assert not packages & {"experiments", "flatness", "testing", "compat", "cli"}


def test_modules_that_are_loaded_when_used_are_attributes():
    code = "import steppe; print(steppe.flatness.sharpness, steppe.compat.SAM, steppe.testing, steppe.integrations)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert set(steppe.__all__) <= set(dir(steppe))


def test_decorated_methods_keep_name_and_docstring():
    assert steppe.SAM.step.__name__ == "step"
    assert steppe.SAM.first_step.__doc__.startswith("Perturb the weights")
