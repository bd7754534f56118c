"""A small network measured by all measures within a small budget."""

import torch.nn.functional as F
from known_hessians import objective, samples

from steppe.flatness import Budget, Objective, measure, normalized_logits

SMALL = Budget(
    m=5,
    ascent_steps=4,
    restarts=2,
    pairs=4,
    num_eigenvalues=2,
    tol=1e-6,
    probes=4,
    density_probes=2,
    density_iterations=8,
    points=3,
    further="batch_sharpness, rounding, gauss_newton, fisher",
)


def measured(net, budget=SMALL, **options):
    x, y = samples()
    normalized = Objective(net, (x, y), loss=normalized_logits(F.cross_entropy), **options)
    return measure(objective(net, (x, y), **options), budget, normalized=normalized)
