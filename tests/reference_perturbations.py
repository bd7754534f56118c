"""Ways up beyond SAM and ASAM, in the notation of their papers: slow, float64, without a line of the package.

Each is a function of one list of gradients, a tensor a parameter, of rho and of the weights, and returns e as a list
again. Those with a memory are objects that are called once at every step.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

Tensors = list[Tensor]
Way = Callable[[Tensors, float, Tensors | None], Tensors]


def length(x: list[Tensor]) -> Tensor:
    return sum(part.square().sum() for part in x).sqrt()


def along(d: list[Tensor], rho: float) -> list[Tensor]:
    return [rho * part / length(d) for part in d]


def linf_e(g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
    """e = rho sign(g) |g|^(q-1) / (|g|_q^q)^(1/p) with p = inf, q = 1 (arXiv 2010.01412, equation 2)."""
    p, q = float("inf"), 1
    norm_q_q = sum((part.abs() ** q).sum() for part in g)
    return [rho * torch.sign(part) * part.abs() ** (q - 1) / norm_q_q ** (1 / p) for part in g]


def zscore_e(g: Tensors, rho: float, w: Tensors | None = None, Q_p: float = 0.95) -> Tensors:
    """e = rho g~ / |g~|, where g~ keeps the entries whose |z| is above its percentile Q_p (arXiv 2505.02369)."""
    kept = []
    for part in g:
        if part.ndim <= 1:
            kept.append(part)
            continue
        z = (part - part.mean()) / part.std()
        mask = z.abs() > torch.quantile(z.abs(), Q_p)
        kept.append(part * mask)
    return along(kept, rho)


class FriendlyE:
    """m_t = lambda m_{t-1} + (1 - lambda) g_t, m_{-1} = 0; e = rho d / |d|, d = g_t - sigma m_t (arXiv 2403.12350)."""

    def __init__(self, sigma: float = 1.0, lmbda: float = 0.9) -> None:
        self.sigma, self.lmbda = sigma, lmbda
        self.m: list[Tensor] | None = None

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        before = [0 * part for part in g] if self.m is None else self.m
        self.m = [self.lmbda * m + (1 - self.lmbda) * part for m, part in zip(before, g, strict=True)]
        return along([part - self.sigma * m for part, m in zip(g, self.m, strict=True)], rho)


class FriendlyCodeE:
    """The same as the authors' code has it: d = g_t - sigma m_{t-1}, from m_0 = g_0 and d_0 = g_0."""

    def __init__(self, m: list[Tensor], sigma: float = 1.0, lmbda: float = 0.9) -> None:
        self.m, self.sigma, self.lmbda = m, sigma, lmbda

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        d = [part - self.sigma * m for part, m in zip(g, self.m, strict=True)]
        self.m = [self.lmbda * m + (1 - self.lmbda) * part for m, part in zip(self.m, g, strict=True)]
        return along(d, rho)


class VarianceSuppressedE:
    """d_t = (1 - theta) d_{t-1} + theta g_t, d_0 = g_0; e = rho d / |d| (arXiv 2309.15639)."""

    def __init__(self, theta: float = 0.9) -> None:
        self.theta = theta
        self.d: list[Tensor] | None = None

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        before = g if self.d is None else self.d
        self.d = [(1 - self.theta) * d + self.theta * part for d, part in zip(before, g, strict=True)]
        return along(self.d, rho)


def fisher_e(g: Tensors, rho: float, w: Tensors | None = None, eta: float = 1.0) -> Tensors:
    """e = rho F^-1 g / sqrt(g' F^-1 g), F = I + eta diag(f), as a matrix; f the squared gradient (arXiv 2206.04920)."""
    flat = torch.cat([part.reshape(-1) for part in g])
    inverse = torch.linalg.inv(torch.eye(flat.numel(), dtype=flat.dtype) + eta * torch.diag(flat**2))
    e = rho * inverse @ flat / torch.sqrt(flat @ inverse @ flat)
    return [line.reshape(part.shape) for line, part in zip(e.split([part.numel() for part in g]), g, strict=True)]


def layerwise_e(g: Tensors, rho: float, w: Tensors, relative: bool = True) -> Tensors:
    """e_l = rho |w_l| g_l / |g_l| in each layer, or without |w_l| (arXiv 2203.02714)."""
    return [rho * (length([w_l]) if relative else 1) * g_l / length([g_l]) for g_l, w_l in zip(g, w, strict=True)]


def stream(who: str, seed: int, step: int, position: int) -> torch.Generator:
    """What a draw depends on."""
    text = f"{who}/{seed}/{step}/{position}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def random_e(w: Tensors, rho: float, step: int, *, filterwise: bool, seed: int = 0) -> Tensors:
    """Noise of length rho; or e_ij ~ N(0, (rho |w_i|)^2) in the filter w_i (arXiv 2211.11489)."""
    r = [torch.randn(p.shape, dtype=p.dtype, generator=stream("Random", seed, step, i)) for i, p in enumerate(w)]
    if not filterwise:
        return along(r, rho)
    e = []
    for noise, part in zip(r, w, strict=True):
        if part.ndim > 1:
            e.append(torch.stack([rho * length([w_i]) * r_i for w_i, r_i in zip(part, noise, strict=True)]))
        else:
            e.append(rho * length([part]) * noise)
    return e


def sam_numbers(g: Tensors, rho: float) -> list[float]:
    """SAM's e, as a list of numbers."""
    numbers = [x for part in g for x in part.reshape(-1).tolist()]
    norm = math.sqrt(math.fsum(x * x for x in numbers))
    return [rho * x / norm for x in numbers]


def as_tensors(numbers: list[float], like: Tensors) -> Tensors:
    left = iter(numbers)
    return [torch.tensor([next(left) for _ in range(p.numel())], dtype=p.dtype).reshape(p.shape) for p in like]


class SparseE:
    """e = m * rho g / |g|, m the largest of the squared gradients, anew after so many steps (arXiv 2210.05177)."""

    def __init__(self, sparsity: float, every: int) -> None:
        self.sparsity, self.every, self.t = sparsity, every, 0
        self.m: set[int] = set()

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        fisher = [x * x for part in g for x in part.reshape(-1).tolist()]
        if self.t % self.every == 0:
            order = sorted(range(len(fisher)), key=lambda i: -fisher[i])
            self.m = set(order[: round((1 - self.sparsity) * len(fisher))])
        self.t += 1
        return as_tensors([x if i in self.m else 0.0 for i, x in enumerate(sam_numbers(g, rho))], g)


class DynamicSparseE:
    """e = m * rho g / |g|; the flattest of m leave it, others come in at random (arXiv 2210.05177)."""

    def __init__(self, steps: int, sparsity: float, drop: float, every: int, seed: int) -> None:
        self.steps, self.sparsity, self.drop, self.every, self.seed, self.t = steps, sparsity, drop, every, seed, 0
        self.m: set[int] = set()

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        gradient = [abs(x) for part in g for x in part.reshape(-1).tolist()]
        chance = [
            x
            for i, part in enumerate(g)
            for x in torch.rand(part.numel(), generator=stream("DynamicSparse", self.seed, self.t, i)).tolist()
        ]
        everything = set(range(len(gradient)))
        kept = round((1 - self.sparsity) * len(gradient))
        if self.t == 0:
            self.m = set(sorted(everything, key=lambda i: -chance[i])[:kept])
        elif self.t % self.every == 0:
            share = self.drop / 2 * (1 + math.cos(math.pi * min(self.t, self.steps) / self.steps))
            number = min(int(share * kept), len(everything) - kept)
            flattest = sorted(self.m, key=lambda i: gradient[i])[:number]
            grown = sorted(everything - self.m, key=lambda i: -chance[i])[:number]
            self.m = (self.m - set(flattest)) | set(grown)
        self.t += 1
        return as_tensors([x if i in self.m else 0.0 for i, x in enumerate(sam_numbers(g, rho))], g)


class StochasticE:
    """e_i = rho g_i / (beta |g|) with probability beta, else 0 (arXiv 2110.03141); or so for whole tensors."""

    def __init__(self, beta: float, seed: int, whole: bool = False) -> None:
        self.beta, self.seed, self.whole, self.t = beta, seed, whole, 0

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        t, self.t = self.t, self.t + 1
        if self.whole:
            climbing = [
                stream("Stochastic", self.seed, t, i).initial_seed() % 2**64 < self.beta * 2**64 for i in range(len(g))
            ]
            d = [part if ascent_steps else 0 * part for part, ascent_steps in zip(g, climbing, strict=True)]
            return along(d, rho / self.beta) if any(climbing) else d
        m = [torch.rand(p.shape, generator=stream("Stochastic", self.seed, t, i)) < self.beta for i, p in enumerate(g)]
        return [part * mask / self.beta for part, mask in zip(along(g, rho), m, strict=True)]


def trajectory(
    L: Callable[[list[Tensor], int], Tensor],
    w: list[Tensor],
    way: Way,
    base: Callable[[list[Tensor]], Optimizer],
    *,
    rho: float,
    steps: int,
) -> list[Tensor]:
    """w after so many steps: g of batch t at w, e(g), g_s of the same batch at w + e, a base step from w with g_s."""
    w = [part.detach().clone().requires_grad_() for part in w]
    optimizer = base(w)
    for t in range(steps):
        g = torch.autograd.grad(L(w, t), w)
        e = way([part.detach() for part in g], rho, [part.detach() for part in w])
        away = [(part.detach() + climb).requires_grad_() for part, climb in zip(w, e, strict=True)]
        g_s = torch.autograd.grad(L(away, t), away)
        for part, grad in zip(w, g_s, strict=True):
            part.grad = grad
        optimizer.step()
    return [part.detach() for part in w]
