"""The head and its loss: cross-entropy of a linear layer's logits.

    forward   z = x Wᵀ over the first vocab_size rows of W,  loss_n = log Σ exp(z_n) − z_n[target_n]
    backward  dz = softmax(z) − onehot(target),  dx = dz W,  dW = dzᵀ x

Rows whose target is ignore_index have loss and gradient zero and do not count in the mean. The rows of W from
vocab_size on are padding: they stay out of the softmax and their gradient is zero.
"""

from torch import Tensor

from . import checks, reference
from .backend import autocast, choose


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy in nats of the logits x @ weight[:vocab_size].T against targets.

    Args:
        x: (N, C) activations.
        weight: (V, C), of any strides; cast to x's dtype.
        targets: (N,) int32 or int64, each in [0, vocab_size) or ignore_index.
        vocab_size: how many rows of the weight are real, all by default.
        ignore_index: a target that does not count.
        reduction: "mean" over the targets that count, "sum", or "none".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or (N,) for "none". The mean of no target is NaN.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device, or a target out of range (named on a CPU).
    """
    name = "linear_cross_entropy"
    checks.floating(name, x=x, weight=weight)
    checks.integers(name, targets=targets)
    checks.same_device(name, "x", x, "targets", targets)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (N, C) and (V, C)"
        )
    checks.shape(name, "targets", targets, x.shape[0])
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"{name}: vocab_size is {vocab_size}; the weight has {len(weight)} rows")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}; it takes 'mean', 'sum' or 'none'")
    x = autocast(x)
    choose(name, x)
    try:
        return reference.linear_cross_entropy(x, weight, targets, vocab_size, ignore_index, reduction)
    except IndexError:
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
        raise ValueError(f"{name}: target {wrong[0].item()} is outside [0, {vocab_size})") from None
