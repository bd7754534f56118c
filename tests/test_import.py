"""Contract C37: `import steppe` is cheap beside `import torch`. Modules are counted, because times vary."""

import ast
import importlib
import inspect
import json
import pickle
import subprocess
import sys

import pytest

import steppe

COST = """
import json, sys, torch
before = set(sys.modules)
import steppe
steppe.SAM
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# statistics and fractions: the standard library's, with what they import
STANDARD_LIBRARY = {"decimal", "_decimal", "fractions", "statistics", "_statistics"}


def test_c37_import_loads_little_beside_torch():
    result = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True)
    modules = json.loads(result.stdout)
    others = [name for name in modules if not name.startswith("steppe")]
    assert set(others) <= STANDARD_LIBRARY, "torch._dynamo, sympy, numpy, ... belong to the functions that use them"
    packages = {name.split(".")[1] for name in modules if "." in name and name.startswith("steppe")}
    # what a plain SAM needs; the methods, variants, closures and schedules are loaded when they are used
    assert packages == {"_checks", "_engine", "_tensors", "papers", "rules", "sam"}


AT_ONCE = """
import sys
from steppe.cli import grammar, main
commands = [[name, "--help"] for name in grammar.grammar().commands]
recipes = [["compare", name, "--help"] for name in grammar.grammar().recipes]
quick = [["--version"], ["-V"], ["--help"], ["recipes"], ["completion", "bash"], ["__complete", "compare", "--m"]]
assert [main(words) for words in commands + recipes + quick] == [0] * len(commands + recipes + quick)
assert main(["compare", "--epoch", "3"]) == 2  # a typo
heavy = {"torch", "numpy", "rich", "tyro", "matplotlib", "scipy", "steppe.methods"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_help_version_completion_and_typos_need_no_torch():
    subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, check=True)


USE = """
import pickle, steppe
module = steppe.methods.bsam, steppe.flatness.sharpness, steppe.compat.SAM, steppe.testing, steppe.integrations
from steppe import LatePhase, variants
from steppe.methods import gsam
from steppe import *
print(L2, SurrogateGap, steppe.variants.gsam, closures.selected, rho_schedule.LinearRho, Report, gsam.SurrogateGap)
"""


@pytest.mark.slow
def test_names_that_are_loaded_when_used_are_found_in_a_fresh_process():
    subprocess.run([sys.executable, "-c", USE], capture_output=True, check=True)
    rule = pickle.dumps(steppe.Adaptive(eta=0.1))  # unpickled where no method is loaded yet
    read = f"import pickle, steppe; assert pickle.loads({rule!r}) == steppe.Adaptive(eta=0.1)"
    subprocess.run([sys.executable, "-c", read], capture_output=True, check=True)


def test_each_public_name_is_an_attribute_and_listed():
    assert {*steppe.__all__, "SAM", "__version__"} <= set(dir(steppe))
    assert [name for name in steppe.__all__ if getattr(steppe, name, None) is None] == []
    assert {"gsam", "bsam", "registry"} <= set(dir(steppe.methods))
    assert steppe.methods.bsam is importlib.import_module("steppe.methods.bsam")
    for module in (steppe, steppe.methods):
        with pytest.raises(AttributeError, match=rf"^module '{module.__name__}' has no attribute 'samm'$"):
            _ = module.samm


def test_type_checkers_import_what_is_loaded_when_used():
    tree = ast.parse(inspect.getsource(steppe))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [(node.module, alias.name) for node in typed.body for alias in node.names]
    homes = {name: f"{home}.{name}" if home == "steppe" else f"{home}:{name}" for home, name in imports}
    assert homes == steppe._LOADED_WHEN_USED


def test_decorated_methods_keep_name_and_docstring():
    assert steppe.SAM.step.__name__ == "step"
    assert steppe.SAM.first_step.__doc__.startswith("Perturb the weights")
