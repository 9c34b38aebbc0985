"""Advantages of a step's samples, from their rewards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..loss import aggregation_weights, group_advantages, overlong_penalty
from .settings import GrpoConfig
from .shape import StepShape


def shaped_rewards(
    shape: StepShape, algorithm: GrpoConfig, max_response_tokens: int | None
) -> Tensor:
    """``[N]`` float64 rewards with DAPO's soft punishment of overlong responses, when it is on.

    Raises:
        ValueError: if it is on and ``max_response_tokens`` is None.
    """
    rewards = torch.from_numpy(shape.rewards)
    if algorithm.overlong_buffer_len == 0:
        return rewards
    if max_response_tokens is None:
        raise ValueError(
            f"overlong_buffer_len={algorithm.overlong_buffer_len} needs max_response_tokens, the "
            "longest response that sampling allows"
        )
    return rewards + overlong_penalty(
        torch.from_numpy(shape.response_lens),
        max_response_tokens,
        algorithm.overlong_buffer_len,
        algorithm.overlong_penalty_factor,
    )


def compute_advantages(shape: StepShape, rewards: Tensor, algorithm: GrpoConfig) -> Tensor:
    """``[N]`` advantages of the samples of one step from their ``rewards [N]``.

    A rollout counts once, its samples take its advantage. No sample may be aborted.

    Raises:
        ValueError: if samples of one rollout have different rewards.
    """
    rollouts, firsts = shape.rollout_numbers, shape.rollout_firsts
    others = firsts[rollouts]
    is_other = others != torch.arange(len(rewards))
    differs = torch.nonzero(is_other & (rewards[others] != rewards))
    if len(differs):
        group = shape.group_ids[int(shape.group_numbers[differs[0]])]
        raise ValueError(
            f"samples of one rollout of group {group!r} have different rewards; give them one "
            "reward, which no penalty of a sample's own (overlong_buffer_len, use_kl_in_reward) "
            "changes, or a rollout_id each"
        )
    settings: dict[str, Any] = {}
    if algorithm.adv_estimator == "grpo":
        settings = {
            "norm_adv_by_std": algorithm.norm_adv_by_std_in_grpo,
            "std_floor": algorithm.std_floor,
        }
    found = group_advantages(
        rewards[firsts],
        shape.group_numbers[firsts],
        estimator=algorithm.adv_estimator,
        trained_counts=shape.rollout_counts,
        **settings,
    )
    return found.advantages[rollouts]


def sample_weights(shape: StepShape, algorithm: GrpoConfig) -> Tensor:
    """``[N]`` weight of every trained token of a sample in the loss of the minibatch ``shape``."""
    is_weighted = "loss_weight" in (shape.carried or ())
    return aggregation_weights(
        torch.from_numpy(shape.loss_lens),
        algorithm.loss_agg_mode,
        rollouts=None if is_weighted else shape.rollout_numbers,
        loss_weights=torch.from_numpy(shape.loss_weights) if is_weighted else None,
        loss_scale_factor=algorithm.loss_scale_factor,
    )
