"""From losses per token to one number: the denominators of the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_at_least, check_name, check_same_length

AGGREGATION_MODES = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def aggregation_weights(
    trained_counts: Tensor,
    mode: str,
    *,
    rollouts: Tensor | None = None,
    loss_weights: Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Weight of every sample such that the loss is the sum of weight times loss over its tokens.

    A sequence is a sample or, with ``rollouts``, all samples of one rollout together. With n_i
    trained tokens in sequence i of S:

    * ``token-mean``: ``1 / sum(n)``
    * ``seq-mean-token-mean``: ``1 / (S n_i)``
    * ``seq-mean-token-sum``: ``1 / S``
    * ``seq-mean-token-sum-norm``: ``1 / (S loss_scale_factor)`` (Dr. GRPO, arXiv 2503.20783)

    So all trained tokens of a rollout weigh the same, in whichever of its samples they stand, and
    a rollout that is recorded in more samples counts no more.

    With ``loss_weights`` every sample is a sequence that counts w_i times: ``w_i / sum(w n)``, and
    ``w_i`` and ``sum(w)`` in the places of 1 and S. Only ratios of them matter: 1 for all is the
    mean over samples, one over the number of its rollout's samples a mean within the rollout of
    means within the sample.

    The weights come from the written-out samples of the global batch, before packing, so the sum
    is the same however tokens are shared, packed, ordered or spread over microbatches and ranks.

    A sequence without trained tokens has weight 0 and counts in S, as in verl's trainer (whose
    ``global_batch_size`` is the number of samples) and TRL. A caller who does not want it in the
    denominator leaves it out of ``trained_counts``.

    Args:
        trained_counts: ``[N]`` trained tokens per sample of the global batch, a token that
            samples share counted in each of them.
        mode: one of ``AGGREGATION_MODES`` (verl's strings).
        rollouts: ``[N]`` integers; samples with equal ones are parts of one rollout.
        loss_weights: ``[N]`` finite and above 0, or 0 for a sample without trained tokens that is
            not to count; they take the place of ``rollouts``.
        loss_scale_factor: constant of ``seq-mean-token-sum-norm``, usually the longest allowed
            response in tokens.

    Returns:
        ``[N]`` float64.

    Raises:
        ValueError: on an unknown mode, counts below 0 or all 0, unequal lengths, rollouts beside
            loss weights, a loss weight that is out of range, a missing or out of range
            ``loss_scale_factor``, or one that the mode would ignore.
    """
    _check_mode(mode, loss_scale_factor)
    if trained_counts.ndim != 1 or trained_counts.dtype.is_floating_point:
        raise ValueError(
            "trained_counts must be a one-dimensional integer tensor, got shape "
            f"{tuple(trained_counts.shape)} and {trained_counts.dtype}"
        )
    if bool((trained_counts < 0).any()):
        raise ValueError("trained_counts must be at least 0")
    if not bool(trained_counts.any()):
        raise ValueError("no sample of the global batch has a trained token: skip the step")
    check_same_length(
        "trained_counts", trained_counts, rollouts=rollouts, loss_weights=loss_weights
    )
    counts, sequences, times = _sequences(trained_counts, rollouts, loss_weights)
    denominators = (times * counts).sum() if mode == "token-mean" else times.sum()
    if mode == "seq-mean-token-mean":
        denominators = denominators * counts.clamp(min=1)
    elif loss_scale_factor is not None:
        denominators = denominators * loss_scale_factor
    return torch.where(counts > 0, times / denominators, 0.0)[sequences]


def _check_mode(mode: str, loss_scale_factor: float | None) -> None:
    check_name("mode", mode, AGGREGATION_MODES)
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


def _sequences(
    trained_counts: Tensor, rollouts: Tensor | None, loss_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Trained tokens ``[S]`` of the sequences, ``[N]`` sequence of every sample, and w ``[S]``."""
    counts, sequences = trained_counts.double(), torch.arange(len(trained_counts))
    if loss_weights is not None:
        if rollouts is not None:
            raise ValueError(
                "loss_weights say how often every sample counts, rollouts that several samples "
                "count once; pass one of them"
            )
        is_idle = (loss_weights == 0) & (trained_counts == 0)
        is_wrong = ~(torch.isfinite(loss_weights) & (loss_weights > 0) | is_idle)
        if bool(is_wrong.any()):
            bad = int(torch.nonzero(is_wrong)[0])
            raise ValueError(
                f"loss_weights[{bad}]={float(loss_weights[bad])} must be finite and above 0; mask "
                "the tokens of a sample that is not to be trained"
            )
        times = loss_weights.double()
        return counts, sequences, times / times.max()
    if rollouts is not None:
        _, sequences = torch.unique(rollouts, return_inverse=True)
        size = int(sequences.max()) + 1
        counts = counts.new_zeros(size).index_add(0, sequences, counts)
    return counts, sequences, torch.ones_like(counts)
