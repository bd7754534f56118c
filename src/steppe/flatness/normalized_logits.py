"""A loss on normalized logits, which does not decrease when all logits are multiplied by a factor."""

from torch import Tensor

from steppe.flatness._forward import Loss


def normalized_logits(loss: Loss) -> Loss:
    """Return the loss of centered logits of unit norm, l((f - mean f) / |f - mean f|, y).

    Once every sample is classified correctly, larger logits lower the cross-entropy and all of its derivatives, so a
    more confident network looks flatter.

    Args:
        loss: (logits, targets) -> mean loss, for logits (batch, classes).

    Returns:
        A loss of the same form. It raises ValueError for logits of another form, and of fewer than three classes: the
        centered logits of two classes have unit norm in two directions only, so that the loss would be constant.

    Example:
        >>> import torch
        >>> loss = normalized_logits(torch.nn.functional.cross_entropy)
        >>> y = torch.tensor([0])
        >>> torch.equal(loss(torch.tensor([[2.0, 0.0, 1.0]]), y), loss(torch.tensor([[300.0, 100.0, 200.0]]), y))
        True

    References:
        Andriushchenko et al. 2023, A Modern Look at the Relationship between Sharpness and Generalization,
        https://arxiv.org/abs/2302.07011.
    """

    def normalized_loss(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.dim() != 2 or logits.shape[1] < 3:
            raise ValueError(
                f"normalized logits are those of (batch, classes) with three classes or more, but the outputs have "
                f"shape {tuple(logits.shape)}: flatten positions into the batch first, (batch * positions, classes)"
            )
        centered = logits - logits.mean(-1, keepdim=True)
        return loss(centered / centered.norm(dim=-1, keepdim=True).clamp_min(1e-10), targets)

    return normalized_loss
