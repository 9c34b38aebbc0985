"""From losses per token to one number: the denominators of the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_at_least, check_name

AGGREGATION_MODES = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def aggregation_weights(
    trained_counts: Tensor, mode: str, *, loss_scale_factor: float | None = None
) -> Tensor:
    """Weight of every sample such that the loss is the sum of weight times loss over its tokens.

    With n_i trained tokens in sample i of N:

    * ``token-mean``: ``1 / sum(n)``
    * ``seq-mean-token-mean``: ``1 / (N n_i)``
    * ``seq-mean-token-sum``: ``1 / N``
    * ``seq-mean-token-sum-norm``: ``1 / (N loss_scale_factor)`` (Dr. GRPO, arXiv 2503.20783)

    The weights come from the written-out samples of the global batch, before packing, so the sum
    is the same however tokens are shared, packed, ordered or spread over microbatches and ranks.

    A sample without trained tokens has weight 0 and counts in N, as in verl's trainer (whose
    ``global_batch_size`` is the number of samples) and TRL. A caller who does not want it in the
    denominator leaves it out of ``trained_counts``.

    Args:
        trained_counts: ``[N]`` trained tokens per sample of the global batch, a token that
            samples share counted in each of them.
        mode: one of ``AGGREGATION_MODES`` (verl's strings).
        loss_scale_factor: constant of ``seq-mean-token-sum-norm``, usually the longest allowed
            response in tokens.

    Returns:
        ``[N]`` float64.

    Raises:
        ValueError: on an unknown mode, counts below 0 or all 0, a missing or out of range
            ``loss_scale_factor``, or one that the mode would ignore.
    """
    check_name("mode", mode, AGGREGATION_MODES)
    if trained_counts.ndim != 1 or trained_counts.dtype.is_floating_point:
        raise ValueError(
            "trained_counts must be a one-dimensional integer tensor, got shape "
            f"{tuple(trained_counts.shape)} and {trained_counts.dtype}"
        )
    if bool((trained_counts < 0).any()):
        raise ValueError("trained_counts must be at least 0")
    total = int(trained_counts.sum())
    if total == 0:
        raise ValueError("no sample of the global batch has a trained token: skip the step")
    if mode == "seq-mean-token-sum-norm":
        if loss_scale_factor is None:
            raise ValueError(
                f"mode={mode!r} needs loss_scale_factor, for example the longest allowed response"
            )
        check_at_least("loss_scale_factor", loss_scale_factor, 0, strict=True)
    elif loss_scale_factor is not None:
        raise ValueError(
            f"loss_scale_factor={loss_scale_factor} needs mode='seq-mean-token-sum-norm', "
            f"got {mode!r}"
        )
    counts = trained_counts.double()
    denominators = torch.full_like(counts, len(counts))
    if mode == "token-mean":
        denominators = torch.full_like(counts, total)
    elif mode == "seq-mean-token-mean":
        denominators = denominators * counts.clamp(min=1)
    elif loss_scale_factor is not None:
        denominators = denominators * loss_scale_factor
    return torch.where(counts > 0, 1 / denominators, 0.0)
