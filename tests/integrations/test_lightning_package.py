"""SAMCallback under the other package that Lightning is distributed in."""

import importlib.util
import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel
import torch, steppe
from steppe.integrations.lightning import SAMCallback

assert issubclass(SAMCallback, pl.Callback) and "lightning.pytorch" not in sys.modules
torch.manual_seed(0)
module, twin = BoringModel(), BoringModel()
twin.load_state_dict(module.state_dict())
data = torch.randn(4, 2, 32)
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[SAMCallback(rho=0.5)], **quiet)
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
optimizer = steppe.SAM(torch.optim.SGD(twin.parameters(), lr=0.1), rho=0.5, model=twin)
for x in data:
    for sam_pass in optimizer.passes():
        with sam_pass:
            twin.loss(twin(x)).backward()
    optimizer.step()
assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="needs pytorch_lightning")
def test_callback_works_with_pytorch_lightning():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
