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
    ResidencyConfig,
    Wave,
    balance_groups,
    equalize_num_microbatches,
    group_shape,
    make_wave,
    part_tree,
    plan_waves,
    step_cost,
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
        pad_to_multiple: ``ParallelSizes.row_multiple``.
        num_microbatches_multiple: ``ParallelSizes.microbatch_multiple``.
        min_shared: see ``data.group_tree``.
        cost_model: balances ranks and rows.
        residency: what becomes of groups that are larger than a row.
    """

    max_tokens: int
    pad_to_multiple: int
    num_microbatches_multiple: int
    min_shared: int | None
    cost_model: CostModel
    residency: ResidencyConfig


def packing_config(config: TrainConfig, plan: ModelPlan) -> PackingConfig:
    """How a run packs, from its parallel layout and the model's sizes."""
    sizes, model = config.parallel.sizes, plan.config
    return PackingConfig(
        max_tokens=config.run.max_tokens_per_microbatch,
        pad_to_multiple=sizes.row_multiple,
        num_microbatches_multiple=sizes.microbatch_multiple,
        min_shared=config.rollout.min_shared,
        cost_model=CostModel.from_model_dims(
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            ffn_hidden_size=plan.active_ffn_hidden_size,
            vocab_size=plan.vocab_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            gated_linear_unit=model.gated_linear_unit,
        ),
        residency=ResidencyConfig(
            choice=config.run.prefix_resident,
            mode=config.run.prefix_resident_mode,
            max_resident_tokens=config.run.max_resident_tokens
            or config.run.max_tokens_per_microbatch,
            num_stages=sizes.pp,
        ),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Minibatch:
    """One optimizer step's groups: the whole, and the rows of this rank.

    Attributes:
        groups: all groups of the minibatch, the same on every rank.
        waves: this rank's rows with their training values.
        tokens: over the rows of all ranks.
        predicted_cost: time of forward and backward on the slowest replica by the cost model, idle
            stages included, in forward FLOPs of one stage.
        predicted_cost_repeated: the same if every group that is larger than a row repeated its
            prompt; None when there is no such group, or no such way.
    """

    groups: tuple[Group, ...]
    waves: tuple[Wave, ...]
    tokens: TokenCounts
    predicted_cost: float
    predicted_cost_repeated: float | None

    @property
    def microbatches(self) -> tuple[Microbatch, ...]:
        """The rows that train, wave by wave."""
        return tuple(batch for wave in self.waves for batch in wave.microbatches)

    def with_microbatches(self, microbatches: Sequence[Microbatch]) -> Minibatch:
        """Copy with other values for ``microbatches``, in their order."""
        numbered = iter(microbatches)
        waves = (
            replace(wave, microbatches=tuple(next(numbered) for _ in wave.microbatches))
            for wave in self.waves
        )
        return replace(self, waves=tuple(waves))


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Size of the rows of all data-parallel ranks.

    Attributes:
        unique: tokens encoded.
        logical: tokens of the written-out samples.
        padded: padding at the end of rows.
        rows: microbatches, prefix rows and fillers included.
        fillers: rows that contribute nothing; their tokens are not counted.
        resident: tokens of resident prefixes, counted in ``unique`` too.
        resident_groups: groups whose prefix is resident.
        repeated_groups: groups that are divided and repeat their prefix.
        waves: of one rank.
    """

    unique: int = 0
    logical: int = 0
    padded: int = 0
    rows: int = 0
    fillers: int = 0
    resident: int = 0
    resident_groups: int = 0
    repeated_groups: int = 0
    waves: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(**{name: n + getattr(other, name) for name, n in self.__dict__.items()})


def plan_all_ranks(
    shapes: Sequence[GroupShape], dp_size: int, packing: PackingConfig
) -> list[list[PackPlan]]:
    """Waves of every data-parallel rank with equally many rows each, from lengths alone."""
    plans = [
        plan_waves(
            shapes,
            packing.max_tokens,
            packing.residency,
            members=members,
            cost_model=packing.cost_model,
            pad_to_multiple=packing.pad_to_multiple,
        )
        for members in balance_groups(shapes, dp_size, packing.cost_model)
    ]
    empty = PackPlan(tuple(shapes), (), packing.pad_to_multiple)
    waves = [
        equalize_num_microbatches(
            [plan[i] if i < len(plan) else empty for plan in plans],
            multiple_of=packing.num_microbatches_multiple,
            cost_model=packing.cost_model,
        )
        for i in range(max(map(len, plans)))
    ]
    return [list(plan) for plan in zip(*waves)]


def count_tokens(plans: Sequence[Sequence[PackPlan]]) -> TokenCounts:
    """Tokens of the waves of all ranks, fillers' left out."""
    total = TokenCounts(waves=len(plans[0]))
    places: dict[int, int] = {}
    for wave in (wave for plan in plans for wave in plan):
        for row in wave.rows:
            unique = sum(part_tree(wave.shapes, part).unique_tokens for part in row)
            total += _row_counts(unique, wave, bool(row))
            for part in row:
                samples = list(part.samples)
                lens = wave.shapes[part.group].tree.sample_lens[samples]
                total += TokenCounts(logical=int(lens.sum()))
                places[part.group] = places.get(part.group, 0) + (not part.is_resident)
        for prefix_row in wave.prefix_rows:
            unique = sum(wave.shapes[group].resident_tokens for group in prefix_row)
            total += _row_counts(unique, wave, bool(prefix_row))
            total += TokenCounts(resident=unique, resident_groups=len(prefix_row))
    return total + TokenCounts(repeated_groups=sum(count > 1 for count in places.values()))


def _row_counts(unique: int, wave: PackPlan, is_used: bool) -> TokenCounts:
    return TokenCounts(
        unique=unique, padded=-unique % wave.pad_to_multiple, rows=1, fillers=int(not is_used)
    )


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
    executions, counts = count_executions(groups)
    weights = aggregation_weights(
        counts, algorithm.loss_agg_mode, loss_scale_factor=algorithm.loss_scale_factor
    )[executions]
    waves = [
        make_wave(plan, groups, sample_weights=weights, advantages=advantages)
        for plan in plans[ranks.dp_rank]
    ]
    tokens = count_tokens(plans)
    return Minibatch(
        groups=tuple(groups),
        waves=tuple(waves),
        tokens=tokens,
        predicted_cost=_predicted_cost(plans, packing),
        predicted_cost_repeated=(
            _cost_if_repeated(shapes, ranks.dp_size, packing)
            if tokens.resident_groups or tokens.repeated_groups
            else None
        ),
    )


def count_executions(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """The sequences that averages are taken over: samples, or executions of several samples.

    Returns:
        ``[N]`` execution of every sample, from 0 in order of appearance, and ``[num_executions]``
        trained tokens of every execution.
    """
    numbers: list[Tensor] = []
    total = 0
    for group in groups:
        numbers.append(group.executions + total)
        total += len(numbers[-1].unique())
    executions = torch.cat([torch.empty(0, dtype=torch.int64), *numbers])
    lens = torch.tensor([s.num_loss_tokens for g in groups for s in g.samples], dtype=torch.int64)
    return executions, torch.zeros(total, dtype=torch.int64).index_add(0, executions, lens)


def _predicted_cost(plans: Sequence[Sequence[PackPlan]], packing: PackingConfig) -> float:
    return max(step_cost(plan, packing.residency, packing.cost_model) for plan in plans)


def _cost_if_repeated(
    shapes: Sequence[GroupShape], dp_size: int, packing: PackingConfig
) -> float | None:
    repeating = replace(packing, residency=replace(packing.residency, choice="never"))
    try:
        return _predicted_cost(plan_all_ranks(shapes, dp_size, repeating), packing)
    except ValueError:
        # A sample is longer than a row: only residency can train it.
        return None


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
