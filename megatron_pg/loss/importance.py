"""Weights that correct for a rollout engine whose probabilities differ from the trainer's."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_at_least, check_name, check_same_length
from .per_sample import sample_means, sample_sums

IMPORTANCE_BOUNDS: dict[str, tuple[float, float]] = {
    "token_truncate": (0.0, 2.0),
    "token_mask": (0.5, 5.0),
    "sequence_truncate": (0.0, 2.0),
    "sequence_mask": (0.5, 2.0),
    "geometric_mask": (0.999, 1.001),
}
"""Default (low, high) of every mode of ``importance_weights``: the presets of verl 0.9."""


def importance_bounds(mode: str, low: float | None, high: float | None) -> tuple[float, float]:
    """``(low, high)`` with the mode's defaults filled in.

    Raises:
        ValueError: on an unknown mode or unless ``0 <= low <= high``, high above 0 and finite.
    """
    check_name("importance mode", mode, IMPORTANCE_BOUNDS)
    default_low, default_high = IMPORTANCE_BOUNDS[mode]
    low = default_low if low is None else low
    high = default_high if high is None else high
    check_at_least("importance low", low, 0)
    check_at_least("importance high", high, 0, strict=True)
    if low > high:
        raise ValueError(f"importance low={low} must not exceed importance high={high}")
    return low, high


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    mode: str,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Weight of every token's policy term, from ``r = exp(old_logprobs - rollout_logprobs)``.

    * ``token_truncate``: r clamped to [low, high] (truncated importance sampling, TIS)
    * ``token_mask``: r, or 0 outside [low, high] (IcePop)
    * ``sequence_truncate``: product of r over the sample, clamped to [low, high] (sequence TIS)
    * ``sequence_mask``: product of r over the sample, or 0 outside [low, high] (masked
      importance sampling, MIS)
    * ``geometric_mask``: 1, or 0 where the geometric mean of r over the sample is outside
      [low, high] (rejection of whole samples)

    Logarithms of r are clamped to +-20, after the sum for sequence modes and before the mean for
    the geometric one, as in verl. A token with weight 0 still counts in the denominators of the
    aggregation.

    Args:
        old_logprobs: ``[M]`` trainer's logprobs before the update.
        rollout_logprobs: ``[M]`` as the rollout engine reported them.
        sample_ids: ``[M]`` int64; all trained tokens of a sample must be present.
        num_samples: samples that ``sample_ids`` refers to.
        mode: a key of ``IMPORTANCE_BOUNDS``.
        low: lower bound of the ratio; None takes the mode's default.
        high: upper bound of the ratio; None takes the mode's default.

    Returns:
        ``[M]`` float64, without gradient.

    Raises:
        ValueError: on an unknown mode, bounds out of range or unequal lengths.
    """
    low, high = importance_bounds(mode, low, high)
    check_same_length(
        "old_logprobs", old_logprobs, rollout_logprobs=rollout_logprobs, sample_ids=sample_ids
    )
    level, action = mode.split("_")
    with torch.no_grad():
        log_ratio = old_logprobs.double() - rollout_logprobs.double()
        if level == "sequence":
            log_ratio = sample_sums(log_ratio, sample_ids, num_samples)[sample_ids]
        log_ratio = log_ratio.clamp(-20.0, 20.0)
        if level == "geometric":
            log_ratio = sample_means(log_ratio, sample_ids, num_samples)[sample_ids]
        ratio = log_ratio.exp()
        if action == "truncate":
            return ratio.clamp(low, high)
        is_inside = (ratio >= low) & (ratio <= high)
        return torch.where(is_inside, torch.ones_like(ratio) if level == "geometric" else ratio, 0)
