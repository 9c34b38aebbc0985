"""From groups to this rank's microbatches: balance, packing, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..data import (
    CostModel,
    Group,
    GroupShape,
    Microbatch,
    PackPlan,
    balance_groups,
    equalize_num_microbatches,
    group_shape,
    make_microbatches,
    plan_rows,
    select_samples,
)
from ..loss import aggregation_weights
from .config import AlgorithmConfig, TrainConfig
from .model_plan import ModelPlan
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


def packing_config(config: TrainConfig, plan: ModelPlan) -> PackingConfig:
    """How a run packs, from its parallel layout and the model's sizes."""
    parallel, model = config.parallel, plan.config
    is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return PackingConfig(
        max_tokens=config.run.max_tokens_per_microbatch,
        pad_to_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        num_microbatches_multiple=parallel.pipeline_model_parallel_size if is_interleaved else 1,
        min_shared=config.rollout.min_shared,
        cost_model=CostModel.from_model_dims(
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            ffn_hidden_size=model.ffn_hidden_size,
            vocab_size=plan.vocab_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            gated_linear_unit=model.gated_linear_unit,
        ),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Minibatch:
    """One optimizer step's groups: the whole, and the rows of this rank.

    Attributes:
        groups: all groups of the minibatch, the same on every rank.
        microbatches: this rank's rows with their training values.
        tokens: over the rows of all ranks.
    """

    groups: tuple[Group, ...]
    microbatches: tuple[Microbatch, ...]
    tokens: TokenCounts


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Size of the rows of all data-parallel ranks.

    Attributes:
        unique: tokens encoded.
        logical: tokens of the written-out samples.
        padded: padding at the end of rows.
        rows: microbatches, fillers included.
        fillers: rows that contribute nothing; their tokens are not counted.
    """

    unique: int = 0
    logical: int = 0
    padded: int = 0
    rows: int = 0
    fillers: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(**{name: n + getattr(other, name) for name, n in self.__dict__.items()})


def plan_all_ranks(
    shapes: Sequence[GroupShape], dp_size: int, packing: PackingConfig
) -> list[PackPlan]:
    """Rows of every data-parallel rank, equally many, from lengths alone."""
    plans = [
        plan_rows(
            shapes,
            packing.max_tokens,
            members=members,
            cost_model=packing.cost_model,
            pad_to_multiple=packing.pad_to_multiple,
        )
        for members in balance_groups(shapes, dp_size, packing.cost_model)
    ]
    return equalize_num_microbatches(
        plans, multiple_of=packing.num_microbatches_multiple, cost_model=packing.cost_model
    )


def count_tokens(plans: Sequence[PackPlan]) -> TokenCounts:
    """Tokens of the rows of all ranks, fillers' left out."""
    total = TokenCounts()
    for plan in plans:
        for row in plan.rows:
            trees = [select_samples(plan.shapes[part.group].tree, part.samples) for part in row]
            unique = sum(tree.unique_tokens for tree in trees)
            total += TokenCounts(
                unique=unique,
                logical=sum(int(tree.sample_lens.sum()) for tree in trees),
                padded=-unique % plan.pad_to_multiple,
                rows=1,
                fillers=int(not row),
            )
    return total


def make_minibatch(
    groups: Sequence[Group],
    advantages: Tensor | None,
    algorithm: AlgorithmConfig,
    packing: PackingConfig,
    ranks: Ranks,
) -> Minibatch:
    """Plan all ranks' rows, then build this rank's.

    Args:
        groups: of one optimizer step, the same on every rank, with a trained token among them.
        advantages: ``[N]`` of their samples in order; None takes the samples' own.
        algorithm: decides the weight of every token.
        packing: decides the rows.
        ranks: whose rows are built.
    """
    shapes = [group_shape(group, packing.min_shared) for group in groups]
    plans = plan_all_ranks(shapes, ranks.dp_size, packing)
    counts = torch.tensor([s.num_loss_tokens for group in groups for s in group.samples])
    weights = aggregation_weights(
        counts, algorithm.loss_agg_mode, loss_scale_factor=algorithm.loss_scale_factor
    )
    microbatches = make_microbatches(
        plans[ranks.dp_rank], groups, sample_weights=weights, advantages=advantages
    )
    return Minibatch(
        groups=tuple(groups), microbatches=tuple(microbatches), tokens=count_tokens(plans)
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
