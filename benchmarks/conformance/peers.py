"""The implementations, and how the environment of each is installed."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """Arguments of ``pip install``, one tuple per call, and a note on unusual ones."""

    installs: tuple[tuple[str, ...], ...]
    note: str = ""


ENVIRONMENTS = {
    "torch": Environment(
        (
            (TORCH, "numpy", "opt-einsum", "temperon==0.1.1", "pytorch_optimizer==4.1.0"),
            ("--no-deps", "sam-pytorch==0.0.1", "heavyball==3.2.1", "unifiedsam==1.0.0", "zij==0.1.1"),
            ("--no-deps", "--editable", str(ROOT)),
        ),
    ),
    "composer": Environment(
        (
            (TORCH, "mosaicml-cli<0.8", "numpy<2.3", "packaging<25.1", "pillow<12", "psutil<8", "py-cpuinfo<10"),
            ("torchmetrics<1.7.5", "coolname<3", "tabulate==0.9.0", "importlib-metadata<9", "tqdm<5", "pytorch-ranger"),
            ("--no-deps", "torchvision==0.28.0", "torch_optimizer<0.4", "mosaicml==0.32.1"),
        ),
        "mosaicml 0.32.1 requires torch < 2.7.1; it is installed without that pin, with the same torch as the others, "
        "and its Trainer runs. torchvision 0.28.0 from PyPI is built for a GPU and cannot load its operators with a "
        "torch for CPUs; the adapter declares the two that are missing, which no statement uses.",
    ),
    "jax": Environment((("jax==0.10.2", "optax==0.2.8"),), "jax 0.10.2 is the newest for Python 3.11."),
}


@dataclass(frozen=True)
class Peer:
    """An implementation, one column of the table."""

    key: str
    title: str
    environment: str


PEERS = {
    peer.key: peer
    for peer in (
        Peer("steppe", "Steppe", "torch"),
        Peer("classic", "classic", "torch"),
        Peer("pytorch_optimizer", "pytorch_optimizer", "torch"),
        Peer("composer", "Composer", "composer"),
        Peer("temperon", "temperon", "torch"),
        Peer("sam_pytorch", "sam-pytorch", "torch"),
        Peer("heavyball", "HeavyBall", "torch"),
        Peer("unifiedsam", "unifiedsam", "torch"),
        Peer("zij", "zij", "torch"),
        Peer("optax", "optax", "jax"),
    )
}

LEFT_OUT = (
    "sam-sps 1.0.0 is an optimizer with its own step size, without a base optimizer that SAM could wrap.",
    "The Keras of TensorFlow (`tf_keras.models.experimental.SharpnessAwareMinimization`) is a model class with its own "
    "training loop outside torch and JAX.",
    "timm, torch_optimizer and Lightning have no SAM in their packages.",
)
