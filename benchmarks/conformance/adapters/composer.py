"""Composer: the ``SAM`` algorithm in its Trainer, the only use in its documentation."""

import logging
import tempfile
from pathlib import Path
from typing import ClassVar

import torch

from conformance.adapters.base import Adapter, Base, Cheaper, Session, quiet
from conformance.outcome import Limitation

quiet()
try:
    import torchvision  # noqa: F401
except RuntimeError:
    # A torchvision that was built for a GPU cannot load its operators with a torch for CPUs, and its import fails
    # without these two. Composer imports it for image transforms, which no statement uses.
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from composer import ComposerModel, Trainer  # noqa: E402
from composer.algorithms import SAM, GradientClipping  # noqa: E402

logging.getLogger("composer").setLevel(logging.ERROR)
DOCS = "https://docs.mosaicml.com/projects/composer/en/latest/api_reference/generated/composer.algorithms.SAM.html"
SOURCE = "https://docs.mosaicml.com/projects/composer/en/latest/_modules/composer/algorithms/sam/sam.html"
RESUME = Limitation(
    "its constructor warns that resuming from a checkpoint fails, unless only the weights are loaded", SOURCE
)
RHO = Limitation("rho must be greater than 0", DOCS)


class Losses(ComposerModel):
    """The model with the statement's own forward; a batch has the indices of its micro-batches."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.losses = ()

    def forward(self, batch):
        """Run the micro-batch's forward."""
        return self.losses[int(batch[0][0])]()

    def loss(self, outputs, batch):
        """Return the outputs, which are the loss already."""
        return outputs


class TrainerSession(Session):
    """A Trainer that fits one batch per step, built at the first step, when its checkpoint and schedulers are known."""

    def __init__(self, model, base, algorithms):
        super().__init__(model, None, base)
        self.algorithms = algorithms
        self.wrapped = Losses(model)
        self.checkpoint = None
        self._trainer = None
        self._parts = 1
        self._folder = tempfile.TemporaryDirectory()

    @property
    def trainer(self):
        """The Trainer, built at the first use."""
        if self._trainer is None:
            numbers = torch.utils.data.TensorDataset(torch.arange(self._parts))
            self._trainer = Trainer(
                model=self.wrapped,
                train_dataloader=torch.utils.data.DataLoader(numbers, batch_size=self._parts),
                device_train_microbatch_size=1,
                optimizers=self.base,
                schedulers=self.schedulers or None,
                step_schedulers_every_batch=True,
                algorithms=self.algorithms,
                max_duration="100000ep",
                device="cpu",
                precision="fp32",
                progress_bar=False,
                load_path=self.checkpoint,
                seed=17,
            )
        return self._trainer

    @property
    def optimizer(self):
        """The optimizer that the Trainer steps."""
        return self.trainer.state.optimizers[0]

    @optimizer.setter
    def optimizer(self, _):
        pass

    @property
    def scheduled(self):
        """The optimizer that is passed to the Trainer."""
        return self.base

    def step(self, *losses):
        """Fit one batch; the Trainer steps the schedulers."""
        self._parts = len(losses)
        self.wrapped.losses = losses
        self.trainer.fit(duration="1ba")
        return self.trainer.state.total_loss_dict["loss/train/total"]

    def save(self):
        """Save a checkpoint of the Trainer."""
        path = Path(self._folder.name) / "checkpoint.pt"
        self.trainer.save_checkpoint(str(path))
        return path

    def load(self, state):
        """Build the Trainer, which loads the checkpoint."""
        self.checkpoint = str(state)
        assert self.trainer is not None


class Composer(Adapter):
    """github.com/mosaicml/composer."""

    title = "Composer"
    distribution = "mosaicml"
    docs = DOCS
    usage = (
        "`Trainer(algorithms=[SAM(rho)], optimizers=base, schedulers=..., device_train_microbatch_size=1)`, one batch "
        "per `fit`; checkpoints are the Trainer's; clipping is its `GradientClipping`."
    )
    not_applicable: ClassVar = {
        "C2c": "the Trainer writes and reads its checkpoints itself",
        "C3": "the Trainer owns the optimizer, and it is not copied",
        "C9a": "the Trainer creates the closure",
        "C16": "the Trainer opens the autocast regions itself, and on a CPU opens none",
        "C17a": "the Trainer's loss scaling needs a GPU",
        "C17b": "the Trainer owns the scaler",
        "C17c": "the Trainer owns the scaler",
        "C25": "the Trainer cannot run on fake tensors, and has no GPU here",
        "C27": "the Trainer cannot run on fake tensors, and has no GPU here",
        "C30": "the Trainer owns the optimizer, and no other engine copies it",
        "C31": "the Trainer owns the optimizer",
        "C33a": "the Trainer creates the closure",
        "C33b": "the Trainer creates the closure",
        "C35": "the radius is an argument of the algorithm, and the Trainer creates the optimizer",
    }
    limitations: ClassVar = {"C1a": RESUME, "C1b": RESUME, "C2a": RESUME, "C2b": RESUME, "C10a": RHO, "C10b": RHO}

    @property
    def package(self):
        """The name that is imported."""
        return "composer"

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build SAM as an algorithm of the Trainer."""
        algorithms = [SAM(rho=rho)]
        if clip is not None:
            algorithms.append(GradientClipping(clipping_type="norm", clipping_threshold=clip))
        return TrainerSession(model, base.make(model.parameters(), state), algorithms)

    def plain(self, model, base: Base):
        """Build the Trainer without SAM."""
        return TrainerSession(model, base.make(model.parameters()), [])

    def cheaper(self, model, base: Base, interval: int):
        """Build SAM at every k-th step."""
        session = TrainerSession(model, base.make(model.parameters()), [SAM(rho=0.05, interval=interval)])
        return Cheaper(session, f"interval={interval}", 1 + 1 / interval)


ADAPTER = Composer()
