"""The contract's statements as behavior that a user meets: each takes an adapter and measures.

None of them names an API of Steppe. ``step`` is the step that an implementation's own documentation shows, and
``plain`` the same loop without SAM. A statement that raises is red, with the error as its measured value.
"""

import copy
import io
import math
import pickle
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.adapters.base import Adapter, Base, Session
from conformance.outcome import NotApplicable, Outcome

STATEMENTS: dict[str, Callable[[Adapter], Outcome]] = {}


def states(id: str) -> Callable[[Callable[[Adapter], Outcome]], Callable[[Adapter], Outcome]]:
    """Register what measures a statement of the catalogue."""

    def register(run: Callable[[Adapter], Outcome]) -> Callable[[Adapter], Outcome]:
        STATEMENTS[id] = run
        return run

    return register


# Problems.

SGD = Base(torch.optim.SGD, {"lr": 0.1})
STILL = Base(torch.optim.SGD, {"lr": 0.0})
MOMENTUM = Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
FUSED = Base(torch.optim.AdamW, {"lr": 0.01, "fused": True})
ADAMW = Base(torch.optim.AdamW, {"lr": 0.01})


LARGE = 50_000_000


class Vector(nn.Module):
    """A model that is one parameter: with a linear loss its gradient is constant, whatever rho is."""

    def __init__(self, *values: float, like: torch.Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values) if like is None else like)


def tiny(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def conv(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, dropout: float = 0.0) -> nn.Module:
    """Make a convolution, a norm, dropout and a linear layer."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers)


def batch(seed: int, n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a batch of noise."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


def train(session: Session, steps: int, start: int = 0, forward: Callable | None = None) -> None:
    """Take steps, each on its own batch; the model is looked up at every pass, as in a user's loop."""
    for step in range(start, start + steps):
        x, y = batch(step, dtype=next(session.model.parameters()).dtype)
        session.step(lambda x=x, y=y: F.cross_entropy((forward or session.model)(x), y))


def flat(model: nn.Module) -> torch.Tensor:
    """Copy all parameters into one vector."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bit for bit."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    """Name the entries of two models' state that differ in any bit."""
    other = b.state_dict()
    return [name for name, value in a.state_dict().items() if not same(value, other[name])]


def buffers_outcome(model: nn.Module, twin: nn.Module) -> Outcome:
    """Compare with what ordinary passes leave."""
    short = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
    wrong = sorted({short[name.rsplit(".", 1)[-1]] for name in differing(model, twin)})
    return Outcome(not wrong, f"{', '.join(wrong)} differ" if wrong else "none differ", "none differ")


def number(value: float) -> str:
    """Write a number short."""
    return f"{value:.3g}"


# The method and the optimizer.


@states("C0")
def the_method(peer: Adapter) -> Outcome:
    """Against autograd, written out."""
    model, twin = tiny(torch.float64), tiny(torch.float64)
    session = peer.build(model, MOMENTUM, 0.2)
    train(session, 20)
    params, base = list(twin.parameters()), MOMENTUM.make(twin.parameters())
    for step in range(20):
        x, y = batch(step, dtype=torch.float64)
        g = torch.autograd.grad(F.cross_entropy(twin(x), y), params)
        n = torch.sqrt(sum(t.square().sum() for t in g))
        up = copy.deepcopy(twin)
        with torch.no_grad():
            for p, t in zip(up.parameters(), g, strict=True):
                p += 0.2 * t / n
        for p, t in zip(params, torch.autograd.grad(F.cross_entropy(up(x), y), list(up.parameters())), strict=True):
            p.grad = t
        base.step()
    off = float((flat(model) - flat(twin)).abs().max())
    return Outcome(off < 1e-7, f"off by {number(off)}", "off by < 1e-7")


def _resumed(peer: Adapter) -> tuple[Session, Vector, float]:
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)

    first, model = Vector(1.0, 1.0), Vector(1.0, 1.0)
    session = peer.build(first, SGD)
    session.schedule(schedule)
    for _ in range(3):
        session.step(lambda: first.w.sum())
    saved = session.save()
    resumed = peer.build(model, SGD)
    resumed.schedule(schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.load(saved)
        before = model.w.detach().clone()
        resumed.step(lambda: model.w.sum())
    return resumed, model, float((before - model.w)[0].detach())


@states("C1a")
def schedule_after_load(peer: Adapter) -> Outcome:
    """Look at what the weights move by: the gradient is 1."""
    session, model, first = _resumed(peer)
    before = model.w.detach().clone()
    session.step(lambda: model.w.sum())
    second = float((before - model.w)[0].detach())
    right = abs(first - 0.0125) < 1e-6 and abs(second - 0.00625) < 1e-6
    return Outcome(right, f"lr {number(first)}, {number(second)}", "lr 0.0125, 0.00625")


@states("C1b")
def groups_after_load(peer: Adapter) -> Outcome:
    """Write into the groups of the object that takes the steps."""
    model = Vector(1.0, 1.0)
    session = peer.build(Vector(1.0, 1.0), SGD)
    session.step(lambda: session.model.w.sum())
    saved = session.save()
    resumed = peer.build(model, SGD)
    resumed.load(saved)
    for group in resumed.optimizer.param_groups:
        group["lr"] = 0.25
    before = model.w.detach().clone()
    resumed.step(lambda: model.w.sum())
    lr = float((before - model.w)[0].detach())
    return Outcome(abs(lr - 0.25) < 1e-6, f"lr {number(lr)}", "lr 0.25")


def _resume_is_exact(build: Callable[[nn.Module], Session], before: int) -> Outcome:
    straight = tiny()
    session = build(straight)
    train(session, before)
    saved, weights = session.save(), copy.deepcopy(straight.state_dict())
    if isinstance(saved, dict):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=False)
    train(session, 5, before)
    model = tiny()
    resumed = build(model)
    model.load_state_dict(weights)
    resumed.load(saved)
    train(resumed, 5, before)
    off = float((flat(model) - flat(straight)).abs().max())
    return Outcome(off == 0, f"off by {number(off)}", "off by 0")


@states("C2a")
def resume(peer: Adapter) -> Outcome:
    """4 steps, checkpoint, 5 steps; the worse of two bases."""
    outcomes = [_resume_is_exact(lambda m, b=base: peer.build(m, b), 4) for base in (MOMENTUM, ADAMW)]
    return min(outcomes, key=lambda outcome: outcome.ok)


@states("C2b")
def resume_the_rule(peer: Adapter) -> Outcome:
    """The checkpoint falls between two of the method's full steps."""
    return _resume_is_exact(lambda m: peer.cheaper(m, MOMENTUM, 3).session, 16)


@states("C2c")
def weights_only(peer: Adapter) -> Outcome:
    """The default of torch.load."""
    session = peer.build(tiny(), MOMENTUM)
    train(session, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save(session.save()["optimizer"], path)
        torch.load(path, weights_only=True)
    return Outcome(True, "loads", "loads")


@states("C2d")
def from_base(peer: Adapter) -> Outcome:
    """The gradient is 1 throughout, so the fourth step with momentum 0.9 is 0.1 (1 + 0.9 + 0.81 + 0.729)."""
    model = Vector(1.0, 1.0)
    plain = Session(model, MOMENTUM.make(model.parameters()))
    for _ in range(3):
        plain.step(lambda: model.w.sum())
    session = peer.build(model, MOMENTUM, state=plain.optimizer.state_dict())
    before = model.w.detach().clone()
    session.step(lambda: model.w.sum())
    moved = float((before - model.w)[0].detach())
    return Outcome(abs(moved - 0.3439) < 1e-4, f"step {number(moved)}", "step 0.344")


@states("C3")
def copies(peer: Adapter) -> Outcome:
    """The worse of the two."""
    session = peer.build(tiny(), MOMENTUM)
    train(session, 2)
    twins = copy.deepcopy(session), pickle.loads(pickle.dumps(session))
    train(session, 2, 2)
    off = 0.0
    for twin in twins:
        train(twin, 2, 2)
        off = max(off, float((flat(twin.model) - flat(session.model)).abs().max()))
    return Outcome(off == 0, f"off by {number(off)}", "off by 0")


@states("C4a")
def hooks(peer: Adapter) -> Outcome:
    """register_step_pre_hook and register_step_post_hook, on the object that schedulers are given."""
    session = peer.build(tiny(), SGD)
    seen: Counter[str] = Counter()
    train(session, 1)
    session.scheduled.register_step_pre_hook(lambda *_: seen.update(["pre"]))
    session.scheduled.register_step_post_hook(lambda *_: seen.update(["post"]))
    train(session, 3, 1)
    return Outcome(seen == {"pre": 3, "post": 3}, f"{seen['pre']} + {seen['post']} calls", "3 + 3 calls")


@states("C4b")
def schedulers(peer: Adapter) -> Outcome:
    """On the object that the documentation gives them."""
    said: list[str] = []
    for make in (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    ):
        session = peer.build(tiny(), MOMENTUM)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            session.schedule(make)
            train(session, 3)
        said += [str(w.message) for w in caught if "scheduler" in str(w.message)]
    return Outcome(not said, f"{len(said)} warnings", "0 warnings")


@states("C5")
def adadelta(peer: Adapter) -> Outcome:
    """Its running average after the first step is (1 - rho) g^2, with g = 1."""
    model = Vector(1.0, 1.0)
    session = peer.build(model, Base(torch.optim.Adadelta, {}), 0.05)
    session.step(lambda: model.w.sum())
    states = [session.base.state[p] for p in model.parameters()]
    decay = 1 - float(states[0]["square_avg"][0])
    return Outcome(abs(decay - 0.9) < 1e-6, f"decay {number(decay)}", "decay 0.9")


# Coming back.


def _restored(peer: Adapter, dtype: torch.dtype) -> Outcome:
    g = torch.Generator().manual_seed(0)
    model = Vector(like=(0.05 * torch.randn(1_000_000, generator=g)).to(dtype))
    c = torch.randn(1_000_000, generator=g).to(dtype)
    session = peer.build(model, STILL)
    before = model.w.detach().clone()
    session.step(lambda: (model.w * c).sum())
    changed = float((model.w.detach() != before).double().mean())
    return Outcome(changed == 0, f"{number(100 * changed)} % differ", "0 % differ")


@states("C6a")
def restored_fp32(peer: Adapter) -> Outcome:
    """A million weights of size 0.05."""
    return _restored(peer, torch.float32)


@states("C6b")
def restored_bf16(peer: Adapter) -> Outcome:
    """A million weights of size 0.05."""
    return _restored(peer, torch.bfloat16)


@states("C6c")
def storage(peer: Adapter) -> Outcome:
    """What a flat buffer, a CUDA graph or a shared tensor relies on."""
    model = tiny()
    before = [p.detach() for p in model.parameters()]  # kept alive, so that no address is given out again
    train(peer.build(model, SGD), 2)
    moved = sum(a.data_ptr() != p.data_ptr() for a, p in zip(before, model.parameters(), strict=True))
    return Outcome(moved == 0, f"{moved} of {len(before)} moved", f"0 of {len(before)} moved")


@states("C7a")
def interrupted(peer: Adapter) -> Outcome:
    """How far from w they are left, in units of rho; the worse of the two."""
    worst = 0.0
    for error in (ZeroDivisionError, KeyboardInterrupt):
        model = tiny()
        session = peer.build(model, SGD, 0.5)
        before, calls = flat(model), []

        def loss(model=model, calls=calls, error=error):
            calls.append(1)
            if len(calls) == 2:
                raise error
            x, y = batch(0)
            return F.cross_entropy(model(x), y)

        try:
            session.step(loss)
        except error:
            worst = max(worst, float((flat(model) - before).norm()) / 0.5)
    return Outcome(worst == 0, f"{number(worst)} rho away", "0 rho away")


def _one_pass_only(peer: Adapter, which: int) -> Outcome:
    model = nn.ParameterDict({"a": nn.Parameter(torch.full((3,), 0.7)), "b": nn.Parameter(torch.full((3,), 0.3))})
    session = peer.build(model, STILL, 0.5)
    before, calls = flat(model), []

    def loss():
        calls.append(1)
        value = model["a"].square().sum()
        return value + model["b"].square().sum() if (len(calls) - 1) % 2 == which else value

    for _ in range(3):
        session.step(loss)
    drift = float((flat(model) - before).abs().max())
    return Outcome(drift < 1e-6, f"drifts by {number(drift)}", "drifts by < 1e-6")


@states("C7b")
def first_only(peer: Adapter) -> Outcome:
    """As with stochastic depth or a routed expert; rounding is not counted here."""
    return _one_pass_only(peer, 0)


@states("C7c")
def second_only(peer: Adapter) -> Outcome:
    """As with stochastic depth or a routed expert; rounding is not counted here."""
    return _one_pass_only(peer, 1)


# Calls, their order, their arguments.


@states("C8a")
def two_passes(peer: Adapter) -> Outcome:
    """By the documented step."""
    model, losses = tiny(), []
    session = peer.build(model, SGD, 0.5)
    x, y = batch(0)

    def loss():
        value = F.cross_entropy(model(x), y)
        losses.append(float(value.detach()))
        return value

    given = session.step(loss)
    right = given is not None and abs(float(given) - losses[0]) < 1e-6
    return Outcome(len(losses) == 2 and right, f"{len(losses)}, {'at w' if right else given}", "2, at w")


@states("C8b")
def cheaper(peer: Adapter) -> Outcome:
    """Over 20 steps, k = 5."""
    method = peer.cheaper(tiny(), SGD, 5)
    calls = []
    for step in range(20):
        x, y = batch(step)
        method.session.step(lambda x=x, y=y: (calls.append(1), F.cross_entropy(method.session.model(x), y))[1])
    passes = len(calls) / 20
    expected = f"{method.passes:.2g} a step"
    return Outcome(abs(passes - method.passes) < 1e-9, f"{method.name}: {passes:.2g} a step", expected)


@states("C9a")
def ordinary_closure(peer: Adapter) -> Outcome:
    """The second such step, which finds the first one's gradients still there."""
    model, twin = Vector(3.0, 4.0), Vector(3.0, 4.0)
    session = peer.build(model, SGD, 0.5)
    c = torch.tensor([1.0, 0.2])
    reference = twin.w.detach().clone()
    calls = 0
    try:
        for d in (c, c.flip(0)):
            seen = []
            session.bare(lambda d=d, seen=seen: (seen.append(1), (d * model.w.square()).sum())[1])
            calls = len(seen)
            g = 2 * d * reference
            reference -= 0.1 * 2 * d * (reference + 0.5 * g / g.norm())
    except Exception as error:
        return Outcome(True, type(error).__name__, "SAM's step or an error")
    off = float((model.w.detach() - reference).abs().max())
    passes = "1 pass" if calls == 1 else f"{calls} passes"
    return Outcome(off < 1e-5, passes if off < 1e-5 else f"{passes}, off by {number(off)}", "SAM's step or an error")


@states("C9b")
def radius(peer: Adapter) -> Outcome:
    """When it is given, or at the first step."""
    taken = []
    for rho in (-1.0, math.nan, math.inf):
        try:
            train(peer.build(tiny(), SGD, rho), 1)
        except Exception:
            continue
        taken.append(str(rho))
    return Outcome(not taken, f"{', '.join(taken)} taken" if taken else "all refused", "all refused")


def _rho_zero(peer: Adapter, dropout: float) -> Outcome:
    model, twin = conv(dropout=dropout), conv(dropout=dropout)
    for session in (peer.build(model, MOMENTUM, 0.0), peer.plain(twin, MOMENTUM)):
        torch.manual_seed(7)
        train(session, 6)
    off = float((flat(model) - flat(twin)).abs().max())
    wrong = differing(model, twin)
    measured = f"weights off by {number(off)}" if off else ("weights equal, buffers not" if wrong else "equal")
    return Outcome(not wrong, measured, "equal")


@states("C10a")
def rho_zero(peer: Adapter) -> Outcome:
    """Six steps; weights and buffers."""
    return _rho_zero(peer, 0.0)


@states("C10b")
def rho_zero_dropout(peer: Adapter) -> Outcome:
    """Six steps; weights and buffers."""
    return _rho_zero(peer, 0.3)


# Directions and sizes.


@states("C11a")
def zero_gradient(peer: Adapter) -> Outcome:
    """The direction is 0/0."""
    model = Vector(1.0, 2.0)
    there = model.w.detach().clone()
    session = peer.build(model, SGD)
    session.step(lambda: 1.0 + (model.w - there).square().sum())
    finite = bool(model.w.isfinite().all())
    return Outcome(finite, "finite" if finite else "NaN", "finite")


@states("C11b")
def maximize(peer: Adapter) -> Outcome:
    """Maximizing -f is minimizing f."""
    down, up = Vector(3.0, 4.0), Vector(3.0, 4.0)
    first = peer.build(down, Base(torch.optim.SGD, {"lr": 1e-3}), 0.5)
    second = peer.build(up, Base(torch.optim.SGD, {"lr": 1e-3, "maximize": True}), 0.5)
    for _ in range(5):
        first.step(lambda: down.w.pow(4).sum())
        second.step(lambda: -up.w.pow(4).sum())
    off = float((down.w - up.w).abs().max().detach())
    return Outcome(off < 1e-6, f"off by {number(off)}", "off by < 1e-6")


def _length(peer: Adapter, gradient: torch.Tensor) -> float:
    model = Vector(like=torch.zeros_like(gradient))
    seen: list[float] = []

    def loss():
        pieces = model.w.detach().split(1_000_000)
        seen.append(math.sqrt(sum(float(piece.double().square().sum()) for piece in pieces)))
        return 1.0 + (model.w * gradient).sum()

    peer.build(model, STILL, 0.05).step(loss)
    return seen[1] / 0.05


@states("C11c")
def half_norm(peer: Adapter) -> Outcome:
    """100,000 gradients of 300."""
    length = _length(peer, torch.full((100_000,), 300.0, dtype=torch.float16))
    return Outcome(abs(length - 1) < 0.05, f"{number(length)} rho", "1 rho")


@states("C11d")
def large_norm(peer: Adapter) -> Outcome:
    """Equal gradients."""
    length = _length(peer, torch.full((LARGE,), 0.01))
    return Outcome(abs(length - 1) < 1e-4, f"{length:.5f} rho", "1.00000 rho")


# What the second pass leaves.


def _buffers(peer: Adapter, norm: Callable[[int], nn.Module]) -> Outcome:
    model, twin = conv(norm), conv(norm)
    train(peer.build(model, STILL, 2.0), 3)
    train(peer.plain(twin, STILL), 3)
    with torch.no_grad():  # rounding on the way back is the subject of C6
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.copy_(q)
    wrong = differing(model, twin)
    near = [
        k for k in wrong if torch.allclose(model.state_dict()[k].double(), twin.state_dict()[k].double(), 1e-5, 1e-6)
    ]
    if near == wrong:
        return Outcome(True, "none differ", "none differ")
    return buffers_outcome(model, twin)


@states("C14a")
def batch_norm(peer: Adapter) -> Outcome:
    """Its counter is the next statement."""

    def norm(channels: int) -> nn.Module:
        layer = nn.BatchNorm2d(channels)
        layer.num_batches_tracked = None
        return layer

    return _buffers(peer, norm)


@states("C14b")
def cumulative(peer: Adapter) -> Outcome:
    """Three steps."""
    return _buffers(peer, lambda channels: nn.BatchNorm2d(channels, momentum=None))


@states("C14c")
def instance_norm(peer: Adapter) -> Outcome:
    """Three steps."""

    def norm(channels: int) -> nn.Module:
        layer = nn.InstanceNorm2d(channels, track_running_stats=True)
        layer.num_batches_tracked = None
        return layer

    return _buffers(peer, norm)


@states("C14d")
def still_learning(peer: Adapter) -> Outcome:
    """An ordinary training pass afterwards moves the running mean."""
    model = conv()
    session, calls = peer.build(model, SGD), []

    def loss():
        calls.append(1)
        x, y = batch(0)
        value = F.cross_entropy(model(x), y)
        if len(calls) == 2:
            raise ZeroDivisionError
        return value

    try:
        session.step(loss)
    except ZeroDivisionError:
        model.train()
    before = model[1].running_mean.clone()
    model(batch(1)[0] + 3)
    moved = not torch.equal(before, model[1].running_mean)
    return Outcome(moved, "learning" if moved else "frozen", "learning")


@states("C15a")
def masks(peer: Adapter) -> Outcome:
    """1,024 units at 0.5."""
    model, seen = Vector(like=torch.ones(1024)), []

    def loss():
        seen.append(F.dropout(torch.ones(1024), 0.5))
        return (model.w * seen[-1]).sum()

    peer.build(model, STILL).step(loss)
    equal = float((seen[0] == seen[1]).float().mean())
    return Outcome(equal == 1, f"{100 * equal:.0f} % equal", "100 % equal")


@states("C15b")
def generators(peer: Adapter) -> Outcome:
    """The number that comes next."""
    after = []
    for build in (lambda m: peer.build(m, STILL), lambda m: peer.plain(m, STILL)):
        model = Vector(like=torch.ones(64))
        session = build(model)
        torch.manual_seed(3)
        session.step(lambda model=model: (model.w * F.dropout(torch.ones(64), 0.5)).sum())
        after.append(torch.get_rng_state())
    equal = torch.equal(*after)
    return Outcome(equal, "same" if equal else "elsewhere", "same")


# Mixed precision, accumulation, clipping.


@states("C16")
def autocast(peer: Adapter) -> Outcome:
    """Not the casts of w that autocast keeps; the loss at w + e over that at w."""
    torch.manual_seed(0)
    model, losses = nn.Linear(8, 1), []
    session = peer.build(model, STILL, 1.0)
    x = torch.randn(4, 8)

    def loss():
        value = model(x).float().square().mean()
        losses.append(float(value.detach()))
        return value

    with torch.autocast("cpu", dtype=torch.bfloat16):
        session.step(loss)
    ratio = losses[1] / losses[0]
    return Outcome(ratio > 1.05, f"loss x {ratio:.2f}", "loss x > 1.05")


@states("C17a")
def scaler(peer: Adapter) -> Outcome:
    """torch.amp.GradScaler on a CPU, scale 1,024; the third of four batches overflows in the second pass."""
    model, twin = tiny(), tiny()
    session, unscaled = peer.build(model, MOMENTUM), peer.build(twin, MOMENTUM)
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        x, y = batch(step)
        calls: list[int] = []

        def loss(x=x, y=y, calls=calls, step=step):
            calls.append(1)
            return F.cross_entropy(model(x), y) * (math.inf if step == 2 and len(calls) == 2 else 1.0)

        before = flat(model)
        session.scaled(grad_scaler, loss)
        if step != 2:
            train(unscaled, 1, step)
        elif not torch.equal(before, flat(model)):
            return Outcome(False, "weights moved", "equal, skipped")
    off = float((flat(model) - flat(twin)).abs().max())
    return Outcome(off < 1e-4, "equal, skipped" if off < 1e-4 else f"off by {number(off)}", "equal, skipped")


def _scaler_closure(peer: Adapter, *, backward_first: bool) -> Outcome:
    model = Vector(1.0, 1.0)
    session = peer.build(model, SGD)
    before = model.w.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    try:
        session.scaler_closure(scaler, lambda: model.w.sum(), backward_first=backward_first)
    except Exception as error:
        return Outcome(True, type(error).__name__, "an error or x 1")
    moved = float((before - model.w.detach())[0]) / 0.1
    return Outcome(abs(moved - 1) < 1e-3, f"update x {moved:.0f}", "an error or x 1")


@states("C17b")
def scaler_closure(peer: Adapter) -> Outcome:
    """The size of the step, in units of the right one; scale 1,024."""
    return _scaler_closure(peer, backward_first=False)


@states("C17c")
def scaler_closure_after_backward(peer: Adapter) -> Outcome:
    """The scaler finds gradients to unscale, and says nothing."""
    return _scaler_closure(peer, backward_first=True)


@states("C18")
def not_finite(peer: Adapter) -> Outcome:
    """In both passes, and in the second only."""
    lost = 0.0
    for bad in ({1, 2}, {2}):
        model, calls = Vector(1.0, 2.0), []
        session = peer.build(model, MOMENTUM)

        def loss(model=model, calls=calls, bad=bad):
            calls.append(1)
            return model.w.square().sum() * (math.nan if len(calls) in bad else 1.0)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                session.step(loss)
        lost = max(lost, float((~model.w.isfinite()).float().mean()))
    return Outcome(lost == 0, f"{100 * lost:.0f} % NaN", "0 % NaN")


@states("C19")
def micro_batches(peer: Adapter) -> Outcome:
    """Three micro-batches a step, in float64."""
    whole, parts = tiny(torch.float64), tiny(torch.float64)
    one, three = peer.build(whole, MOMENTUM, 0.2), peer.build(parts, MOMENTUM, 0.2)
    for step in range(4):
        x, y = batch(step, dtype=torch.float64)
        one.step(lambda x=x, y=y: F.cross_entropy(whole(x), y))
        three.step(
            *(lambda x=mx, y=my: F.cross_entropy(parts(x), y) for mx, my in zip(x.chunk(3), y.chunk(3), strict=True))
        )
    off = float((flat(whole) - flat(parts)).abs().max())
    return Outcome(off < 1e-6, f"off by {number(off)}", "off by < 1e-6")


@states("C20")
def clipping(peer: Adapter) -> Outcome:
    """Norm 0.01, and plain SGD with lr = 1: the step is no longer than that."""
    model = tiny()
    before = flat(model)
    train(peer.build(model, Base(torch.optim.SGD, {"lr": 1.0}), clip=0.01), 1)
    moved = float((flat(model) - before).norm())
    return Outcome(moved < 0.0101, f"step {number(moved)}", "step <= 0.01")


# Speed.


class Handmade:
    """A loss whose backward writes ready-made gradients: a CPU build of torch has no autograd for CUDA tensors."""

    def __init__(self, model: nn.Module, gradients: list[torch.Tensor]) -> None:
        self.model, self.gradients = model, gradients

    def backward(self) -> None:
        """Write them."""
        for p, g in zip(self.model.parameters(), self.gradients, strict=True):
            p.grad = g

    def detach(self) -> "Handmade":
        """It has no graph."""
        return self

    def __add__(self, _: object) -> "Handmade":
        return self


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith("prim.") and "detach" not in str(func):  # questions and views, no work
            self.count += 1
        return func(*args, **(kwargs or {}))


def _on_fake_cuda(build: Callable[[nn.Module, Base], Session], tensors: int, base: Base) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.ParameterList([nn.Parameter(torch.empty(3, 5, device="cuda")) for _ in range(tensors)])
        session = build(model, base)
        gradients = [torch.ones_like(p) for p in model]
        session.step(lambda: Handmade(model, gradients))
        with Operations() as operations:
            session.step(lambda: Handmade(model, gradients))
    return operations.count


@states("C25")
def no_synchronization(peer: Adapter) -> Outcome:
    """Reading a value on the host raises there."""
    try:
        for base in (SGD, MOMENTUM):
            _on_fake_cuda(peer.build, 3, base)
    except Exception as error:
        return Outcome(False, f"{type(error).__name__}", "no read")
    return Outcome(True, "no read", "no read")


@states("C26")
def recompilation(peer: Adapter) -> Outcome:
    """torch.compile, five steps."""
    torch._dynamo.reset()
    counters.clear()
    model = conv()
    compiled = torch.compile(model, backend="aot_eager")
    session = peer.build(model, MOMENTUM)
    train(session, 1, forward=compiled)
    first = counters["stats"]["unique_graphs"]
    train(session, 4, 1, forward=compiled)
    more = counters["stats"]["unique_graphs"] - first
    torch._dynamo.reset()
    if not first:
        raise NotApplicable("nothing was compiled")
    return Outcome(more == 0, f"{more} more", "0 more")


@states("C27")
def operations(peer: Adapter) -> Outcome:
    """Of the climb and the way back, without the base's own step; counted with fake CUDA tensors."""
    few, many = (_on_fake_cuda(peer.build, n, FUSED) - _on_fake_cuda(peer.plain, n, FUSED) for n in (10, 100))
    return Outcome(many == few, f"{few} for 10, {many} for 100", "equal")
