"""steppe.integrations imports a framework at the first use of its module, and not before."""

import subprocess
import sys

import pytest

import steppe

pytest.importorskip("accelerate")

SCRIPT = """
import sys
import steppe

frameworks = {"accelerate", "keras", "lightning", "peft", "pytorch_lightning", "transformers"}
assert not frameworks & sys.modules.keys()
assert steppe.integrations.accelerate.passes.__module__ == "steppe.integrations.accelerate"
assert "accelerate" in sys.modules and "keras" not in sys.modules
"""


@pytest.mark.slow
def test_framework_is_imported_at_first_use():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_integration_raises_with_the_names_of_all():
    known = "accelerate, keras, lightning, peft, transformers"
    with pytest.raises(AttributeError, match=f"no attribute 'tensorflow'.*{known}"):
        _ = steppe.integrations.tensorflow
