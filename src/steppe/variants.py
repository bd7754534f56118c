"""The named methods: each only fills slots where it can, and says what a step costs."""

from collections.abc import Iterable
from typing import Any, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe import papers
from steppe.ascent import Steps
from steppe.cadences import Every, GradientNorm, Late, Randomly
from steppe.combinations import PenalizedNorm, Reuse, SurrogateGap, Weighted
from steppe.methods import BSAM, DecoupledWSAM, Lookbehind, SAMPa
from steppe.modifiers import DynamicSparse, Only, Sparse, Stochastic, norm_layers
from steppe.perturbations import L2, Adaptive, Fisher, Friendly, LayerWise, Momentum, Random, VarianceSuppressed, ZScore
from steppe.rules import Perturbation
from steppe.sam import SAM
from steppe.trajectory_loss import MESA, SAF

Rho = float | Tensor


class _Surroundings(TypedDict, total=False):
    replay_rng: bool
    per_rank: bool
    scaler: torch.amp.GradScaler | None
    stochastic_rounding: bool


class Options(_Surroundings, total=False):
    """What every method takes beside its own, as :class:`steppe.SAM` does."""

    model: nn.Module | None


def sam(
    base_optimizer: Optimizer,
    rho: Rho = 0.05,
    *,
    steps: int = 1,
    only: Iterable[Tensor] | None = None,
    **options: Unpack[Options],
) -> SAM:
    """SAM: climb along the gradient, e = rho g / |g|, and go down with the gradient there. Two passes a step.

    With ``steps`` climbs in the place of one it costs 1 + steps; with ``only``, no other parameters climb:
    :func:`steppe.norm_layers`, :func:`steppe.layers` and :func:`steppe.last_layers` choose some.

    >>> import torch
    >>> sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
    L2()

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """
    return SAM(base_optimizer, rho, **options, perturbation=_modified(L2(), steps, only))


def asam(
    base_optimizer: Optimizer,
    rho: Rho = 0.5,
    *,
    eta: float = 0.01,
    steps: int = 1,
    only: Iterable[Tensor] | None = None,
    **options: Unpack[Options],
) -> SAM:
    """ASAM: climb in proportion to the weights, e = rho T^2 g / |T g|, T = |w| + eta. Two passes a step.

    ``steps`` and ``only`` are those of :func:`sam`.

    >>> import torch
    >>> asam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
    Adaptive(eta=0.01)

    Source: Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
    Networks, arXiv 2102.11600.
    """
    return SAM(base_optimizer, rho, **options, perturbation=_modified(Adaptive(eta), steps, only))


def msam(base_optimizer: Optimizer, rho: Rho = 3.0, **options: Unpack[Options]) -> SAM:
    """MSAM: climb against the base's momentum, e = -rho v / |v|. One pass a step, at w + e.

    Source: Becker et al., Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, arXiv 2401.12033.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Momentum())


def rwp(
    base_optimizer: Optimizer,
    rho: Rho = 0.01,
    *,
    filterwise: bool = True,
    seed: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """RWP: climb in a random direction, in each filter in proportion to its norm. One pass a step, at w + e.

    Source: Li et al., Efficient Generalization Improvement Guided by Random Weight Perturbation, arXiv 2211.11489.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Random(filterwise, seed))


def mixed_rwp(
    base_optimizer: Optimizer, rho: Rho = 0.01, *, alpha: float = 0.5, seed: int = 0, **options: Unpack[Options]
) -> SAM:
    """m-RWP: go down with (1 - alpha) g + alpha times the gradient at a random w + e. Two passes a step.

    Source: Li et al., Revisiting Random Weight Perturbation for Efficiently Improving Generalization, arXiv 2404.00357.
    """
    noise = Random(filterwise=True, seed=seed, paper=papers.MIXED_RWP)
    return SAM(base_optimizer, rho, **options, perturbation=noise, combination=PenalizedNorm(alpha))


def fisher_sam(base_optimizer: Optimizer, rho: Rho = 0.1, *, eta: float = 1.0, **options: Unpack[Options]) -> SAM:
    """Fisher SAM: climb in the metric of the Fisher information's diagonal, 1 + eta g^2. Two passes a step.

    Source: Kim et al., Fisher SAM: Information Geometry and Sharpness Aware Minimisation, arXiv 2206.04920.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Fisher(eta))


def layerwise_sam(
    base_optimizer: Optimizer, rho: Rho = 0.01, *, relative: bool = True, **options: Unpack[Options]
) -> SAM:
    """Layer-wise SAM: each tensor climbs along its own gradient, by rho times its own norm. Two passes a step.

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """
    return SAM(base_optimizer, rho, **options, perturbation=LayerWise(relative))


def sparse_sam(
    base_optimizer: Optimizer,
    rho: Rho = 0.1,
    *,
    sparsity: float = 0.5,
    every: int = 100,
    **options: Unpack[Options],
) -> SAM:
    """SSAM-F: climb only where the Fisher information is largest. Two passes a step.

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Sparse(L2(), sparsity, every))


def dynamic_sparse_sam(
    base_optimizer: Optimizer,
    rho: Rho = 0.1,
    *,
    steps: int,
    sparsity: float = 0.5,
    drop: float = 0.5,
    every: int = 100,
    seed: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """SSAM-D: climb with a mask that drops its flattest coordinates and grows random ones. Two passes a step.

    ``steps`` is the length of the training, over which the exchange dies away.

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177.
    """
    rule = DynamicSparse(L2(), steps, sparsity, drop, every, seed)
    return SAM(base_optimizer, rho, **options, perturbation=rule)


def esam(
    base_optimizer: Optimizer, rho: Rho = 0.05, *, beta: float = 0.6, seed: int = 0, **options: Unpack[Options]
) -> SAM:
    """ESAM: climb with a random share beta of the weights, go down with selected samples. 4/3 + gamma passes a step.

    This is the climb, which costs two passes as any other. What saves is the selection of samples, which is a matter
    of the closure: give ``step()`` the one that :func:`steppe.closures.selected` makes, with its ``gamma``.

    Source: Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv
    2110.03141.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Stochastic(L2(), beta, seed))


def friendly_sam(
    base_optimizer: Optimizer,
    rho: Rho = 0.05,
    *,
    sigma: float = 1.0,
    lmbda: float = 0.9,
    **options: Unpack[Options],
) -> SAM:
    """F-SAM: climb along the batch's own part of the gradient, g - sigma EMA(g). Two passes a step.

    Source: Li et al., Friendly Sharpness-Aware Minimization, arXiv 2403.12350.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Friendly(sigma, lmbda))


def vasso(base_optimizer: Optimizer, rho: Rho = 0.05, *, theta: float = 0.9, **options: Unpack[Options]) -> SAM:
    """VaSSO: climb along a running mean of the gradient. Two passes a step.

    Source: Li and Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, arXiv 2309.15639.
    """
    return SAM(base_optimizer, rho, **options, perturbation=VarianceSuppressed(theta))


def zsharp(base_optimizer: Optimizer, rho: Rho = 0.05, *, percentile: float = 0.95, **options: Unpack[Options]) -> SAM:
    """ZSharp: climb along the gradient's outstanding entries, by z-score in each tensor. Two passes a step.

    Source: Yun, Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks, arXiv 2505.02369.
    """
    return SAM(base_optimizer, rho, **options, perturbation=ZScore(percentile))


def sam_on(base_optimizer: Optimizer, rho: Rho, *, model: nn.Module, **options: Unpack[_Surroundings]) -> SAM:
    """SAM-ON: climb with the normalisation layers only, with a radius of their own. Two passes a step.

    Source: Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv 2306.04226.
    """
    perturbation = Only(L2(), norm_layers(model), papers.SAM_ON)
    return SAM(base_optimizer, rho, model=model, **options, perturbation=perturbation)


def gsam(base_optimizer: Optimizer, rho: Rho = 0.05, *, alpha: float = 0.2, **options: Unpack[Options]) -> SAM:
    """GSAM: go down with g_s - alpha times the part of g orthogonal to it. Two passes a step.

    Source: Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065.
    """
    return SAM(base_optimizer, rho, **options, combination=SurrogateGap(alpha))


def wsam(
    base_optimizer: Optimizer,
    rho: Rho = 0.05,
    *,
    gamma: float = 0.9,
    decoupled: bool = False,
    **options: Unpack[Options],
) -> SAM:
    """WSAM: go down with g + gamma / (1 - gamma) (g_s - g). Two passes a step.

    ``decoupled`` is the paper's weight decouple: the base sees g alone, and the sharpness term acts after its step, as
    AdamW's weight decay does. The two differ around a base that does more than subtract lr times its gradient.

    Source: Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
    2305.15817.
    """
    if decoupled:
        return DecoupledWSAM(base_optimizer, rho, gamma=gamma, **options)
    return SAM(base_optimizer, rho, **options, combination=Weighted(gamma))


def pgn(base_optimizer: Optimizer, rho: Rho = 0.1, *, alpha: float = 0.8, **options: Unpack[Options]) -> SAM:
    """PGN: penalise the gradient's norm, go down with (1 - alpha) g + alpha g_s. Two passes a step.

    Source: Zhao et al., Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning, arXiv
    2202.03599.
    """
    return SAM(base_optimizer, rho, **options, combination=PenalizedNorm(alpha))


def looksam(
    base_optimizer: Optimizer, rho: Rho = 0.05, *, k: int = 5, alpha: float = 0.7, **options: Unpack[Options]
) -> SAM:
    """LookSAM: climb at every k-th step, and reuse between where g_s pointed away from g. 1 + 1/k passes a step.

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """
    return SAM(base_optimizer, rho, **options, combination=Reuse(alpha), cadence=Every(k))


def late_sam(
    base_optimizer: Optimizer, rho: Rho = 0.05, *, start: float = 0.75, steps: int, **options: Unpack[Options]
) -> SAM:
    """Late SAM: plain steps first, SAM from a fraction ``start`` of ``steps`` on. 2 - start passes a step on average.

    Source: Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, arXiv
    2410.10373.
    """
    return SAM(base_optimizer, rho, **options, cadence=Late(start, steps))


def random_sam(
    base_optimizer: Optimizer, rho: Rho = 0.05, *, p: float = 0.5, seed: int = 0, **options: Unpack[Options]
) -> SAM:
    """RST: climb at each step with probability p. 1 + p passes a step on average.

    Source: Zhao et al., Randomized Sharpness-Aware Training for Boosting Computational Efficiency in Deep Learning,
    arXiv 2203.09962.
    """
    return SAM(base_optimizer, rho, **options, cadence=Randomly(p, seed))


def aesam(
    base_optimizer: Optimizer,
    rho: Rho = 0.05,
    *,
    steps: int,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
    delta: float = 0.9,
    **options: Unpack[Options],
) -> SAM:
    """AE-SAM: climb where |g|^2 is unusually large. Between 1 and 2 passes a step, about 1.5 with the usual values.

    ``steps`` is the length of the training, over which climbs get more frequent.

    Source: Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, arXiv 2304.14647.
    """
    return SAM(base_optimizer, rho, **options, cadence=GradientNorm(steps, lambda_1, lambda_2, delta))


def lookbehind_sam(
    base_optimizer: Optimizer,
    rho: Rho = 0.05,
    *,
    k: int = 2,
    alpha: float | None = 0.5,
    **options: Unpack[Options],
) -> SAM:
    """Lookbehind: k climbs, a step of the base from each, and a share alpha of that way. 1 + k passes a step.

    Source: Mordido et al., Lookbehind-SAM: k Steps Back, 1 Step Forward, arXiv 2307.16704.
    """
    return Lookbehind(base_optimizer, rho, k=k, alpha=alpha, **options)


def sampa(
    base_optimizer: Optimizer,
    rho: Rho = 0.1,
    *,
    lmbda: float = 0.2,
    group: dist.ProcessGroup | None = None,
    **options: Unpack[Options],
) -> SAM:
    """SAMPa: the two passes of a step do not wait for each other. Two passes a step, on two devices in the time of one.

    They follow each other in one process; ``group``, of two processes, lets each make one of them.

    Source: Xie et al., SAMPa: Sharpness-aware Minimization Parallelized, arXiv 2410.10683.
    """
    return SAMPa(base_optimizer, rho, lmbda=lmbda, group=group, **options)


def bsam(
    params: Any, lr: Rho = 0.5, rho: Rho = 0.01, *, n_data: int, model: nn.Module | None = None, **kwargs: Any
) -> SAM:
    """bSAM: SAM as the optimal relaxation of Bayes, with a variance for each weight. Two passes a step.

    An optimizer of its own: it has no base, and takes the parameters. ``n_data`` is the number of training samples;
    further arguments are those of :class:`steppe.methods.BSAM`.

    Source: Moellenhoff and Khan, SAM as an Optimal Relaxation of Bayes, arXiv 2210.01620.
    """
    return BSAM(params, lr, rho=rho, n_data=n_data, model=model, **kwargs)


def saf(samples: int, classes: int, **kwargs: Any) -> SAF:
    """SAF: a term of the loss that keeps the outputs near those of E epochs ago. One pass a step, no climb.

    Not an optimizer but what its closure adds to the loss; the arguments are those of :class:`steppe.SAF`.

    >>> saf(samples=60_000, classes=10).epochs_ago
    3

    Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """
    return SAF(samples, classes, **kwargs)


def mesa(model: nn.Module, optimizer: Optimizer | None = None, **kwargs: Any) -> MESA:
    """MESA: a term of the loss that keeps the outputs near those of averaged weights. 4/3 passes a step, no climb.

    Not an optimizer but what its closure adds to the loss; the arguments are those of :class:`steppe.MESA`.

    Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """
    return MESA(model, optimizer, **kwargs)


def _modified(rule: Perturbation, steps: int, only: Iterable[Tensor] | None) -> Perturbation:
    rule = rule if steps == 1 else Steps(rule, steps)
    return rule if only is None else Only(rule, only)
