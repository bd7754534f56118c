"""Methods of the literature that are not here, and why; listed below the table of docs/methods."""

from collections.abc import Sequence

ABSENT: Sequence[tuple[str, str, str]] = (
    (
        "X-SAM",
        "2601.10251",
        "Corrects g_s along the leading eigenvector v. The paper's formula and the authors' optimizer could not be "
        "read, only the abstract and the README of their code. The update that another library documents depends on "
        "the sign of v, and an eigenvector has none.",
    ),
    (
        "CC-SAM",
        "",
        "Perturbs the classifier once for each class of the batch, with a radius of each class and layer, and then "
        "trains it on perturbed features of a frozen network (the authors' code was read). `closures.perturb_on` makes "
        "one perturbation a step. A perturbation for each class, with the mean of the gradients, is a loop over "
        "`passes(accumulate=i > 0, loss_weight=n_c / n)` with the samples of one class each; the radii by class and "
        "the second phase are not here.",
    ),
    (
        "AsyncSAM",
        "2503.11147",
        "A second device computes the gradient of an earlier step on a batch of its own. Its single-pass form on one "
        "device is [Stale SAM](stale_sam.md).",
    ),
    (
        "SWAD",
        "2102.08604",
        "Averages the weights over a window that the validation loss chooses during training. "
        "[`steppe.averaging`](../averaging.md) averages steps that are chosen in advance.",
    ),
    (
        "Switch EMA",
        "2402.09240",
        "Continues each epoch from the average. [`steppe.averaging`](../averaging.md) never writes the average into "
        "the weights that are trained.",
    ),
    (
        "SAMformer",
        "2402.10198",
        "A network for time series, trained by SAM: `steppe.SAM` around its optimizer. The network is not here.",
    ),
    (
        "SAM-SPS and AdaSAM",
        "",
        "Step sizes of their own for SAM. They were not built: with Steppe, the step is that of any base optimizer.",
    ),
    (
        "FedSAM and other federated methods",
        "",
        "A client takes ordinary steps of SAM; what the server averages is the framework's.",
    ),
)
"""Name, arXiv id or nothing, and the reason."""


def absent_methods() -> list[str]:
    """Return an entry of the list for each, as Markdown."""
    return [
        f"**{name}**{f' ([arXiv {arxiv}](https://arxiv.org/abs/{arxiv}))' if arxiv else ''}. {reason}"
        for name, arxiv, reason in ABSENT
    ]
