"""From groups to this rank's microbatches: advantages, weights, balance, packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data import (
    CostModel,
    Group,
    Microbatch,
    PackPlan,
    balance_groups,
    equalize_num_microbatches,
    group_shape,
    make_microbatches,
    plan_rows,
)
from ..loss import aggregation_weights, group_advantages, overlong_penalty
from .config import AlgorithmConfig, RolloutConfig
from .ranks import Ranks

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """What decides the rows of a run.

    Attributes:
        max_tokens: budget of a row in unique tokens.
        pad_to_multiple: tp_size under sequence parallelism, else 1.
        num_microbatches_multiple: pipeline size under an interleaved schedule, else 1.
        min_shared: see ``data.group_tree``.
        cost_model: balances ranks and rows.
    """

    max_tokens: int
    pad_to_multiple: int
    num_microbatches_multiple: int
    min_shared: int | None
    cost_model: CostModel


@dataclass(frozen=True, eq=False, kw_only=True)
class Minibatch:
    """One optimizer step's groups: the whole, and the rows of this rank.

    Attributes:
        groups: all groups of the minibatch, the same on every rank.
        plan: this rank's rows.
        microbatches: this rank's rows with their training values.
        unique_tokens, logical_tokens, padded_tokens: over all ranks' rows.
    """

    groups: tuple[Group, ...]
    plan: PackPlan
    microbatches: tuple[Microbatch, ...]
    unique_tokens: int
    logical_tokens: int
    padded_tokens: int


def shaped_rewards(
    groups: Sequence[Group], algorithm: AlgorithmConfig, rollout: RolloutConfig
) -> Tensor:
    """``[N]`` float64 rewards with DAPO's soft punishment of overlong responses, when it is on."""
    rewards = torch.cat([group.rewards for group in groups])
    if algorithm.overlong_buffer_len == 0:
        return rewards
    lens = torch.tensor([len(s.response_ids) for group in groups for s in group.samples])
    return rewards + overlong_penalty(
        lens,
        rollout.max_response_tokens,
        algorithm.overlong_buffer_len,
        algorithm.overlong_penalty_factor,
    )


def compute_advantages(
    groups: Sequence[Group], rewards: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """``(advantages [N], has_spread [num_groups])`` over the groups of one step."""
    numbers = torch.repeat_interleave(torch.tensor([len(group.samples) for group in groups]))
    counts = torch.tensor([s.num_loss_tokens for group in groups for s in group.samples])
    settings: dict[str, Any] = {}
    if algorithm.adv_estimator == "grpo":
        settings = {
            "norm_adv_by_std": algorithm.norm_adv_by_std_in_grpo,
            "std_floor": algorithm.std_floor,
        }
    elif algorithm.adv_estimator.startswith("reinforce_plus_plus"):
        settings = {"trained_counts": counts}
    result = group_advantages(rewards, numbers, estimator=algorithm.adv_estimator, **settings)
    return result.advantages, result.has_spread


def make_minibatch(
    groups: Sequence[Group],
    advantages: Tensor | None,
    algorithm: AlgorithmConfig,
    packing: PackingConfig,
    ranks: Ranks,
) -> Minibatch:
    """Plan all ranks' rows from lengths alone, then build this rank's.

    Args:
        groups: of one optimizer step, the same on every rank.
        advantages: ``[N]`` of their samples in order; None takes the samples' own.
        algorithm: decides the weight of every token.
        packing: decides the rows.
        ranks: whose rows are built.
    """
    shapes = [group_shape(group, packing.min_shared) for group in groups]
    members = balance_groups(shapes, ranks.dp_size, packing.cost_model)
    plans = [
        plan_rows(
            shapes,
            packing.max_tokens,
            members=member,
            cost_model=packing.cost_model,
            pad_to_multiple=packing.pad_to_multiple,
        )
        for member in members
    ]
    plans = equalize_num_microbatches(
        plans, multiple_of=packing.num_microbatches_multiple, cost_model=packing.cost_model
    )
    counts = torch.tensor([s.num_loss_tokens for group in groups for s in group.samples])
    weights = aggregation_weights(
        counts, algorithm.loss_agg_mode, loss_scale_factor=algorithm.loss_scale_factor
    )
    plan = plans[ranks.dp_rank]
    microbatches = make_microbatches(plan, groups, sample_weights=weights, advantages=advantages)
    layouts = [p.row_layout(row) for p in plans for row in range(len(p.rows)) if p.rows[row]]
    return Minibatch(
        groups=tuple(groups),
        plan=plan,
        microbatches=tuple(microbatches),
        unique_tokens=sum(layout.unique_tokens for layout in layouts),
        logical_tokens=sum(layout.logical_tokens for layout in layouts),
        padded_tokens=sum(layout.padding_tokens for layout in layouts),
    )


def split_evenly(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Items in order, in ``count`` runs as even as can be, or fewer so that none is empty."""
    count = min(count, len(items))
    bounds = [len(items) * i // count for i in range(count + 1)] if items else []
    return [list(items[a:b]) for a, b in zip(bounds, bounds[1:])]


def written_out(groups: Sequence[Group]) -> list[Group]:
    """Every sample as a group of its own: the same tokens with nothing shared."""
    return [
        replace(group, group_id=f"{group.group_id}/{i}", samples=(sample,))
        for group in groups
        for i, sample in enumerate(group.samples)
    ]
