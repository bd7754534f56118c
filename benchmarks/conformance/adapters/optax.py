"""optax.contrib.sam in its opaque mode. JAX is functional, so the statements that apply have functions of their own."""

import io
import pickle
import warnings
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from conformance.adapters.base import Adapter
from conformance.outcome import NotApplicable, Outcome

jax.config.update("jax_enable_x64", True)


def sam(outer, rho: float = 0.05):
    """Build SAM as in the documentation: an adversarial optimizer of normalized gradients."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    return optax.contrib.sam(outer, ascent, sync_period=2, opaque_mode=True)


def guarded(outer):
    """Add the documented guard against NaN, for either pass."""
    return optax.apply_if_finite(sam(optax.apply_if_finite(outer, 5)), 5)


def step(optimizer, loss, params, state):
    """Take one step as in the documentation."""
    gradient = jax.grad(lambda p, _: loss(p))
    updates, state = optimizer.update(gradient(params, 0), state, params, grad_fn=gradient)
    return optax.apply_updates(params, updates), state


def problem(seed: int):
    """Return a smooth loss of a small matrix, a different one for each seed."""
    x, y = jax.random.normal(jax.random.key(seed), (2, 12, 8), dtype=jnp.float64)
    return lambda w: jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def start():
    """Return the initial weights."""
    return jax.random.normal(jax.random.key(99), (8, 8), dtype=jnp.float64)


def train(optimizer, w, state, first: int, last: int):
    """Take steps, each on its own batch."""
    for seed in range(first, last):
        w, state = step(optimizer, problem(seed), w, state)
    return w, state


def follows_the_paper() -> Outcome:
    """Measure C0."""
    optimizer = sam(optax.sgd(0.1, momentum=0.9), 0.2)
    w, _ = train(optimizer, start(), optimizer.init(start()), 0, 20)
    v, m = start(), 0.0
    for seed in range(20):
        g = jax.grad(problem(seed))(v)
        m = 0.9 * m + jax.grad(problem(seed))(v + 0.2 * g / jnp.sqrt(jnp.sum(g**2)))
        v = v - 0.1 * m
    off = float(jnp.max(jnp.abs(v - w)))
    return Outcome(off < 1e-7, f"off by {off:.3g}", "off by < 1e-7")


def schedule() -> Outcome:
    """Measure C1a; the schedule's count is in the state."""
    optimizer = sam(optax.sgd(lambda n: 0.1 * 0.5**n))
    w = jnp.ones(2)
    state = optimizer.init(w)
    for _ in range(4):
        state = pickle.loads(pickle.dumps(jax.device_get(state)))
        before = w
        w, state = step(optimizer, jnp.sum, w, state)
    lr = float((before - w)[0])
    return Outcome(abs(lr - 0.0125) < 1e-6, f"lr {lr:.3g}", "lr 0.0125")


def resume() -> Outcome:
    """Measure C2a."""
    worst = 0.0
    for outer in (optax.sgd(0.1, momentum=0.9), optax.adamw(0.01)):
        optimizer = sam(outer)
        w, state = train(optimizer, start(), optimizer.init(start()), 0, 4)
        saved = io.BytesIO(pickle.dumps(jax.device_get((w, state))))
        straight, _ = train(optimizer, w, state, 4, 9)
        resumed, _ = train(optimizer, *pickle.load(saved), 4, 9)
        worst = max(worst, float(jnp.max(jnp.abs(straight - resumed))))
    return Outcome(worst == 0, f"off by {worst:.3g}", "off by 0")


def restored(dtype) -> Outcome:
    """Measure C6."""
    w = (0.05 * jax.random.normal(jax.random.key(0), (1_000_000,))).astype(dtype)
    c = jax.random.normal(jax.random.key(1), (1_000_000,)).astype(dtype)
    optimizer = sam(optax.sgd(0.0))
    after, _ = step(optimizer, lambda p: jnp.sum(p * c), w, optimizer.init(w))
    changed = float(jnp.mean(after != w))
    return Outcome(changed == 0, f"{100 * changed:.3g} % differ", "0 % differ")


def gradients() -> Outcome:
    """Measure C8a; the gradient is evaluated twice, and the user has the loss of the first evaluation."""
    calls = []
    optimizer = sam(optax.sgd(0.1))
    step(optimizer, lambda p: (calls.append(1), problem(0)(p))[1], start(), optimizer.init(start()))
    return Outcome(len(calls) == 2, f"{len(calls)}, at w", "2, at w")


def rho_zero() -> Outcome:
    """Measure C10b, with a dropout mask from a key."""
    outer = optax.sgd(0.1, momentum=0.9)
    optimizer, w, v = sam(outer, 0.0), start(), start()
    state, plain = optimizer.init(w), outer.init(v)
    for seed in range(6):
        mask = jax.random.bernoulli(jax.random.key(seed), 0.7, (8, 8)) / 0.7

        def loss(p, seed=seed, mask=mask):
            return problem(seed)(p * mask)

        w, state = step(optimizer, loss, w, state)
        updates, plain = outer.update(jax.grad(loss)(v), plain, v)
        v = optax.apply_updates(v, updates)
    off = float(jnp.max(jnp.abs(v - w)))
    return Outcome(off == 0, f"weights off by {off:.3g}" if off else "equal", "equal")


def zero_gradient() -> Outcome:
    """Measure C11a."""
    minimum = jnp.array([1.0, 2.0])
    optimizer = guarded(optax.sgd(0.1))
    w, _ = step(optimizer, lambda p: 1.0 + jnp.sum((p - minimum) ** 2), minimum, optimizer.init(minimum))
    finite = bool(jnp.isfinite(w).all())
    return Outcome(finite, "finite" if finite else "NaN", "finite")


def length(gradient) -> float:
    """Return the length of the perturbation in units of rho."""
    w = jnp.zeros_like(gradient)
    seen = []
    optimizer = sam(optax.sgd(0.0), 0.05)
    state = optimizer.init(w)

    def evaluate(p, _):
        seen.append(float(jnp.sqrt(jnp.sum(p.astype(jnp.float64) ** 2))))
        return gradient

    optimizer.update(evaluate(w, 0), state, w, grad_fn=evaluate)
    return seen[1] / 0.05


def half_norm() -> Outcome:
    """Measure C11c."""
    measured = length(jnp.full(100_000, 300.0, jnp.float16))
    return Outcome(abs(measured - 1) < 0.05, f"{measured:.3g} rho", "1 rho")


def large_norm() -> Outcome:
    """Measure C11d."""
    measured = length(jnp.full(50_000_000, 0.01, jnp.float32))
    return Outcome(abs(measured - 1) < 1e-4, f"{measured:.5f} rho", "1.00000 rho")


def not_finite() -> Outcome:
    """Measure C18."""
    lost = 0.0
    for bad in ({1, 2}, {2}):
        w, calls = jnp.array([1.0, 2.0]), []
        optimizer = guarded(optax.sgd(0.1, momentum=0.9))
        state = optimizer.init(w)

        def gradient(p, _, calls=calls, bad=bad):
            calls.append(1)
            return 2 * p * (jnp.nan if len(calls) in bad else 1.0)

        for _ in range(3):
            updates, state = optimizer.update(gradient(w, 0), state, w, grad_fn=gradient)
            w = optax.apply_updates(w, updates)
        lost = max(lost, float(jnp.mean(~jnp.isfinite(w))))
    return Outcome(lost == 0, f"{100 * lost:.0f} % NaN", "0 % NaN")


def clipping() -> Outcome:
    """Measure C20, with clipping in the outer optimizer's chain."""
    optimizer = sam(optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0)))
    w, _ = step(optimizer, problem(0), start(), optimizer.init(start()))
    moved = float(jnp.sqrt(jnp.sum((w - start()) ** 2)))
    return Outcome(moved < 0.0101, f"step {moved:.3g}", "step <= 0.01")


def lost_in_rounding() -> Outcome:
    """Measure C36."""
    w = jnp.array([1.0, -1.0], jnp.float32)
    optimizer = sam(optax.sgd(0.1), 1e-12)
    state = optimizer.init(w)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(20):
            w, state = step(optimizer, lambda p: jnp.sum(jnp.exp(p)), w, state)
    return Outcome(bool(seen), "a warning" if seen else "silent", "a warning, an error or a report")


def typed() -> Outcome:
    """Measure C37."""
    found = (Path(optax.__file__).parent / "py.typed").is_file()
    return Outcome(found, "py.typed" if found else "no py.typed", "py.typed")


class Optax(Adapter):
    """github.com/google-deepmind/optax."""

    title = "optax"
    distribution = "optax"
    docs = "https://optax.readthedocs.io/en/latest/api/contrib.html"
    usage = (
        "`optax.contrib.sam(outer, chain(normalize(), sgd(rho)), opaque_mode=True)` with a `grad_fn`; checkpoints are "
        "its state, pickled; `optax.apply_if_finite` against NaN; clipping in the outer chain."
    )
    own_statements: ClassVar = {
        "C0": follows_the_paper,
        "C1a": schedule,
        "C2a": resume,
        "C6a": lambda: restored(jnp.float32),
        "C6b": lambda: restored(jnp.bfloat16),
        "C8a": gradients,
        "C10b": rho_zero,
        "C11a": zero_gradient,
        "C11c": half_norm,
        "C11d": large_norm,
        "C18": not_finite,
        "C20": clipping,
        "C36": lost_in_rounding,
        "C37": typed,
    }
    not_applicable: ClassVar = {
        "C1b": "JAX: no param_groups",
        "C2b": "has SAM only",
        "C2c": "JAX: no torch.load",
        "C2d": "JAX: states are the user's own values",
        "C3": "JAX: states are values",
        "C4a": "JAX: no hooks",
        "C4b": "JAX: a schedule is a function",
        "C5": "JAX: optimizers are composed, and their arguments do not collide",
        "C6c": "JAX: arrays are immutable",
        "C7a": "JAX: weights are never changed in place",
        "C7b": "JAX: every gradient exists",
        "C7c": "JAX: every gradient exists",
        "C8b": "has SAM only",
        "C9a": "JAX: no closure",
        "C9b": "JAX: the radius is the learning rate of the user's own ascent optimizer",
        "C10a": "JAX: running statistics are the user's own values",
        "C11b": "no such option",
        "C14a": "JAX: running statistics are the user's own values",
        "C14b": "JAX: running statistics are the user's own values",
        "C14c": "JAX: running statistics are the user's own values",
        "C14d": "JAX: no layer is disabled",
        "C15a": "JAX: the user passes the key of both passes",
        "C15b": "JAX: the user passes the key of both passes",
        "C16": "JAX: no autocast",
        "C17a": "JAX: no GradScaler",
        "C17b": "JAX: no GradScaler",
        "C17c": "JAX: no GradScaler",
        "C19": "JAX: grad_fn is the user's own sum",
        "C25": "JAX: a step is compiled",
        "C26": "JAX: a step is compiled",
        "C27": "JAX: a step is compiled",
        "C28a": "JAX: parameters are the user's own values",
        "C28b": "JAX: buffers are the user's own values",
        "C28c": "JAX: the user passes the key of both passes",
        "C29": "JAX: weights are never changed in place",
        "C30": "JAX: states are values",
        "C32": "JAX: running statistics are the user's own values",
        "C31": "JAX: an optimizer has no modes",
        "C33a": "JAX: no closure",
        "C33b": "JAX: no graph is retained",
        "C34": "JAX: grad_fn is the user's own",
        "C35": "JAX: the radius is the learning rate of the user's own ascent optimizer",
    }

    def build(self, model, base, rho=0.05, *, clip=None, state=None):
        """Raise NotApplicable: there is no torch model."""
        raise NotApplicable("JAX")


ADAPTER = Optax()
