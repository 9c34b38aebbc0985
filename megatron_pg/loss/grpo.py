"""The whole loss of one microbatch, from flat arrays to a scalar and its metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import check_same_length
from .importance import importance_weights
from .kl import kl_penalty
from .policy import POLICY_LOSSES, PolicyLossConfig, clamped_log_ratio

LOSS_SHARES = ("loss", "policy_loss", "kl_loss", "entropy_loss")
"""Metric sums that are shares of the global loss, and no sums over tokens."""


def grpo_loss(
    logprobs: Tensor,
    entropy: Tensor | None = None,
    *,
    weights: Tensor,
    advantages: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    config: PolicyLossConfig,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This microbatch's share of the global loss.

    Equals the sum over its trained tokens of ``weights`` times the loss that ``PolicyLossConfig``
    describes. The sum over all microbatches and data-parallel ranks is the global loss: nothing
    is averaged afterwards. Everything is computed in float64.

    Args:
        logprobs: ``[M]`` of the current policy; the gradient flows here.
        entropy: ``[M]`` of the current policy, differentiable; needed by ``entropy_coeff``.
        weights: ``[M]`` share of every token, ``aggregation_weights(...)`` of its sample.
        advantages: ``[M]``.
        sample_ids: ``[M]`` int64 in [0, num_samples): all trained tokens of a sample stand in
            one microbatch.
        num_samples: samples of the microbatch.
        config: the loss.
        old_logprobs: ``[M]`` before the update; None means that the policy is the one that
            sampled, so that the ratio is 1 (its gradient is not 0).
        ref_logprobs: ``[M]`` of the reference model; needed by ``kl_loss_coef``.
        rollout_logprobs: ``[M]`` of the rollout engine; needed by ``importance_mode``.

    Returns:
        ``(loss, sums)``: a float64 scalar, and detached float64 scalars to be summed over
        microbatches and ranks. ``loss`` and its terms ``policy_loss``, ``kl_loss`` and
        ``entropy_loss`` (minus the bonus) are shares of the global value; all others are sums
        over tokens, ``num_tokens`` the number of them (see ``metric_means``).

    Raises:
        ValueError: on unequal lengths, those that the policy loss returns among them, or a missing
            array that the config needs.
    """
    check_same_length(
        "logprobs",
        logprobs,
        entropy=entropy,
        weights=weights,
        advantages=advantages,
        sample_ids=sample_ids,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
    )
    for name, array, option, value in (
        ("entropy", entropy, "entropy_coeff", config.entropy_coeff),
        ("ref_logprobs", ref_logprobs, "kl_loss_coef", config.kl_loss_coef),
        ("rollout_logprobs", rollout_logprobs, "importance_mode", config.importance_mode),
    ):
        if value and array is None:
            raise ValueError(f"{option}={value!r} needs {name}")
    logprobs, weights = logprobs.double(), weights.double()
    old_logprobs = (logprobs if old_logprobs is None else old_logprobs).detach().double()
    policy_loss, metrics = POLICY_LOSSES[config.policy_loss](
        logprobs, old_logprobs, advantages.double(), sample_ids, num_samples, config
    )
    # The sum that a loss of one's own may return would count once for every token.
    check_same_length("logprobs", logprobs, **metrics, policy_loss=policy_loss)
    if rollout_logprobs is not None:
        metrics["rollout_logprob_diff"] = (old_logprobs - rollout_logprobs.double()).abs()
        if config.importance_mode is not None:
            metrics["importance_weight"] = importance_weights(
                old_logprobs,
                rollout_logprobs,
                sample_ids,
                num_samples,
                config.importance_mode,
                low=config.importance_low,
                high=config.importance_high,
            )
            policy_loss = policy_loss * metrics["importance_weight"]
    terms = {"policy_loss": policy_loss}
    if ref_logprobs is not None:
        kl = kl_penalty(logprobs, ref_logprobs.detach().double(), config.kl_loss_type)
        metrics["kl"] = kl
        if config.use_unbiased_kl:
            kl = kl * clamped_log_ratio(logprobs, old_logprobs).exp()
        if config.kl_loss_coef:
            terms["kl_loss"] = config.kl_loss_coef * kl
    if entropy is not None:
        metrics["entropy"] = entropy.double()
        if config.entropy_coeff:
            terms["entropy_loss"] = -config.entropy_coeff * entropy.double()
    shares = {name: (weights * term).sum() for name, term in terms.items()}
    loss = torch.stack(list(shares.values())).sum()
    sums = {"loss": loss.detach()} | {name: share.detach() for name, share in shares.items()}
    sums |= {name: metric.detach().sum() for name, metric in metrics.items()}
    sums["num_tokens"] = weights.new_full((), len(weights))
    return loss, sums


def metric_means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of the global batch from the ``sums`` of ``grpo_loss``, added over all calls.

    Token sums are divided by ``num_tokens`` (1 when there are none); shares of the loss and
    ``num_tokens`` itself stay as they are.

    Args:
        sums: every value a scalar.
    """
    num_tokens = max(float(sums["num_tokens"]), 1.0)
    return {
        name: float(value) / (1.0 if name in ("num_tokens", *LOSS_SHARES) else num_tokens)
        for name, value in sums.items()
    }
