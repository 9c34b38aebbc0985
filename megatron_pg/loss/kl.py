"""Distance to the reference model: estimators of the KL divergence per token."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_at_least, check_name, check_same_length
from .per_sample import sample_sums

_ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
KL_KINDS = tuple(name + suffix for name in ("k1", "k2", "k3", *_ALIASES) for suffix in ("", "+"))


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from a sampled token (verl's formulas).

    With ``d = ref_logprobs - logprobs``:

    * ``k1`` (``kl``): ``-d``
    * ``k2`` (``mse``): ``d^2 / 2``
    * ``k3`` (``low_var_kl``): ``exp(d) - d - 1``, d clamped to +-20 and the result to +-10

    k1 and k3 have the right mean but not the gradient of the KL divergence, k2 has the gradient.
    A ``+`` after the kind (``k3+``) keeps the value and takes the gradient of k2. See Schulman,
    http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: ``[M]`` of the policy; the gradient flows here.
        ref_logprobs: ``[M]`` of the reference model.
        kind: one of ``KL_KINDS``.

    Returns:
        ``[M]``.

    Raises:
        ValueError: on an unknown kind or unequal lengths.
    """
    check_name("kind", kind, KL_KINDS)
    check_same_length("logprobs", logprobs, ref_logprobs=ref_logprobs)
    value = _estimate(logprobs, ref_logprobs, kind.removesuffix("+"))
    if not kind.endswith("+"):
        return value
    straight_through = _estimate(logprobs, ref_logprobs, "k2")
    return straight_through - straight_through.detach() + value.detach()


def _estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    kind = _ALIASES.get(kind, kind)
    difference = ref_logprobs - logprobs
    if kind == "k1":
        return -difference
    if kind == "k2":
        return 0.5 * difference.square()
    difference = difference.clamp(-20.0, 20.0)
    return (difference.exp() - difference - 1).clamp(-10.0, 10.0)


def kl_in_reward(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    sample_ids: Tensor,
    *,
    kl_coef: float,
    kind: str = "k1",
) -> Tensor:
    """Outcome rewards less ``kl_coef`` times the KL estimate summed over the sample's tokens.

    The reward that verl's ``use_kl_in_reward`` gives to an estimator of outcome rewards, which
    adds up the token rewards of a sample.

    Args:
        rewards: ``[N]``.
        old_logprobs: ``[M]`` of the policy that sampled, one per trained token.
        ref_logprobs: ``[M]`` of the reference model.
        sample_ids: ``[M]`` int64 in [0, N).
        kl_coef: finite, at least 0.
        kind: one of ``KL_KINDS``.

    Returns:
        ``[N]`` float64, without gradient.

    Raises:
        ValueError: on an unknown kind, a coefficient out of range or unequal lengths.
    """
    check_at_least("kl_coef", kl_coef, 0)
    kl = kl_of_samples(old_logprobs, ref_logprobs, sample_ids, len(rewards), kind=kind)
    return rewards.detach().double() - kl_coef * kl


def kl_of_samples(
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    *,
    kind: str = "k1",
) -> Tensor:
    """``[num_samples]`` float64 KL estimates, summed over every sample's trained tokens.

    Arguments are those of ``kl_in_reward``.

    Raises:
        ValueError: on an unknown kind or unequal lengths.
    """
    check_same_length("old_logprobs", old_logprobs, sample_ids=sample_ids)
    with torch.no_grad():
        kl = kl_penalty(old_logprobs.double(), ref_logprobs.double(), kind)
        return sample_sums(kl, sample_ids, num_samples)
