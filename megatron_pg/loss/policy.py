"""What is minimised per token: the policy losses and their settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_at_least, check_name
from .importance import importance_bounds
from .kl import KL_KINDS
from .per_sample import sample_means


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossConfig:
    """Settings of the loss of one trained token.

    The loss is ``importance weight * policy loss + kl_loss_coef * kl - entropy_coeff * entropy``.
    Numbers are at least 0.

    Attributes:
        policy_loss: a key of ``POLICY_LOSSES``.
        clip_ratio_low: the ratio is clipped below at ``1 - clip_ratio_low``.
        clip_ratio_high: the ratio is clipped above at ``1 + clip_ratio_high``; above
            ``clip_ratio_low`` this is DAPO's clip-higher (arXiv 2503.14476). GSPO needs values
            around 3e-4 and 4e-4 (arXiv 2507.18071).
        clip_ratio_c: dual clip of ``ppo_clip`` (arXiv 1912.09729): with a negative advantage the
            loss of a token is at most ``-clip_ratio_c * advantage``. Above 1; None turns it off.
        kl_loss_coef: weight of the KL estimate to the reference model.
        kl_loss_type: one of ``KL_KINDS``.
        use_unbiased_kl: multiply the KL estimate by the differentiable ratio of current to old
            policy, which makes it unbiased off-policy (DeepSeek-V3.2, arXiv 2512.02556).
        entropy_coeff: weight of the entropy bonus.
        importance_mode: a key of ``IMPORTANCE_BOUNDS``; None for no correction.
        importance_low: lower bound of the correction; None takes the mode's default.
        importance_high: upper bound of the correction; None takes the mode's default.

    Raises:
        ValueError: on an unknown name, a number out of range or an option that would be ignored.
    """

    policy_loss: str = "ppo_clip"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.28
    clip_ratio_c: float | None = None
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "k3"
    use_unbiased_kl: bool = False
    entropy_coeff: float = 0.0
    importance_mode: str | None = None
    importance_low: float | None = None
    importance_high: float | None = None

    def __post_init__(self) -> None:
        check_name("policy_loss", self.policy_loss, POLICY_LOSSES)
        check_name("kl_loss_type", self.kl_loss_type, KL_KINDS)
        for name in ("clip_ratio_low", "clip_ratio_high", "kl_loss_coef", "entropy_coeff"):
            check_at_least(name, getattr(self, name), 0)
        if self.clip_ratio_c is not None:
            check_at_least("clip_ratio_c", self.clip_ratio_c, 1, strict=True)
            if self.policy_loss != "ppo_clip":
                raise ValueError(
                    f"clip_ratio_c={self.clip_ratio_c} needs policy_loss='ppo_clip', "
                    f"got {self.policy_loss!r}"
                )
        if self.use_unbiased_kl and self.kl_loss_coef == 0:
            raise ValueError("use_unbiased_kl=True needs kl_loss_coef above 0")
        if self.importance_mode is not None:
            importance_bounds(self.importance_mode, self.importance_low, self.importance_high)
        elif self.importance_low is not None or self.importance_high is not None:
            raise ValueError("importance_low and importance_high need an importance_mode")


PolicyLossFn = Callable[
    [Tensor, Tensor, Tensor, Tensor, int, PolicyLossConfig], tuple[Tensor, dict[str, Tensor]]
]
POLICY_LOSSES: dict[str, PolicyLossFn] = {}
"""Policy losses by name, all with one signature.

``loss(logprobs, old_logprobs, advantages, sample_ids, num_samples, config)`` takes flat ``[M]``
arrays of trained tokens and returns the loss per token ``[M]``, differentiable in ``logprobs``,
and detached metrics per token ``[M]``: ``ratio``, ``ppo_kl`` (old minus current logprob) and 0/1
for ``clipfrac_low``, ``clipfrac_high`` (clipped at 1 - clip_ratio_low, 1 + clip_ratio_high) and
``clipfrac_dual``. All trained tokens of a sample must be in one call.
"""


def register_policy_loss(name: str) -> Callable[[PolicyLossFn], PolicyLossFn]:
    """Decorator that makes a function available as ``PolicyLossConfig(policy_loss=name)``.

    Raises:
        ValueError: if the name is taken.
    """

    def register(loss: PolicyLossFn) -> PolicyLossFn:
        if name in POLICY_LOSSES:
            raise ValueError(f"policy loss {name!r} is registered already; choose another name")
        POLICY_LOSSES[name] = loss
        return loss

    return register


@register_policy_loss("ppo_clip")
def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``max(-r A, -clip(r) A)``, with dual clip ``min(that, -c A)`` where A < 0; r per token."""
    log_ratio = clamped_log_ratio(logprobs, old_logprobs)
    ratio = log_ratio.exp()
    loss, is_low, is_high = _clipped_loss(ratio, advantages, config)
    is_dual: Tensor | None = None
    if config.clip_ratio_c is not None:
        bound = -advantages * config.clip_ratio_c
        is_dual = (advantages < 0) & (loss > bound)
        loss = torch.where(is_dual, bound, loss)
    return loss, _metrics(ratio, log_ratio, is_low, is_high, is_dual)


@register_policy_loss("gspo")
def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``ppo_clip``, with the geometric mean of the token ratios of the sample as ratio.

    Token form of arXiv 2507.18071: the value is the sample's ratio, the gradient of token t flows
    through its own logprob. With seq-mean-token-mean this is the gradient of the sequence form.
    """
    log_ratio = logprobs - old_logprobs
    mean = sample_means(log_ratio.detach(), sample_ids, num_samples).to(log_ratio.dtype)
    sequence_log_ratio = mean[sample_ids] + logprobs - logprobs.detach()
    ratio = sequence_log_ratio.clamp(max=10.0).exp()
    loss, is_low, is_high = _clipped_loss(ratio, advantages, config)
    return loss, _metrics(ratio, log_ratio, is_low, is_high)


@register_policy_loss("cispo")
def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-stop_gradient(clip(r)) A logprob`` (arXiv 2506.13585); every token keeps a gradient.

    Bounds are distances from 1, as in verl; ``clip_ratio_low >= 1`` leaves out the lower one.
    """
    log_ratio = clamped_log_ratio(logprobs, old_logprobs).detach()
    ratio = log_ratio.exp()
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    loss = -ratio.clamp(low, high) * advantages * logprobs
    return loss, _metrics(ratio, log_ratio, ratio < low, ratio > high)


@register_policy_loss("reinforce")
def reinforce(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-A logprob``: no ratio, no clipping."""
    log_ratio = clamped_log_ratio(logprobs, old_logprobs)
    is_clipped = torch.zeros_like(log_ratio, dtype=torch.bool)
    return -advantages * logprobs, _metrics(log_ratio.exp(), log_ratio, is_clipped, is_clipped)


def clamped_log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """``logprobs - old_logprobs`` clamped to +-20, as in verl: no ratio overflows."""
    return (logprobs - old_logprobs).clamp(-20.0, 20.0)


def _clipped_loss(
    ratio: Tensor, advantages: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    return loss, (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def _metrics(
    ratio: Tensor,
    log_ratio: Tensor,
    is_low: Tensor,
    is_high: Tensor,
    is_dual: Tensor | None = None,
) -> dict[str, Tensor]:
    ratio = ratio.detach()
    is_dual = torch.zeros_like(is_low) if is_dual is None else is_dual
    return {
        "ratio": ratio,
        "ppo_kl": -log_ratio.detach(),
        "clipfrac_low": is_low.to(ratio.dtype),
        "clipfrac_high": is_high.to(ratio.dtype),
        "clipfrac_dual": is_dual.to(ratio.dtype),
    }
