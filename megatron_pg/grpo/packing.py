"""The rows of one replica, and as many of them on every other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from ..data import (
    CostModel,
    GroupShape,
    PackPlan,
    ResidencyConfig,
    balance_groups,
    part_tree,
    plan_waves,
    step_cost,
    with_num_rows,
)
from ..mcore import has_sample_losses
from ..parallel import ParallelSizes
from .replicas import Replicas
from .settings import PrefixGroupConfig


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """What decides the rows of a step.

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

    @classmethod
    def from_config(
        cls, settings: PrefixGroupConfig, model: Any, cost_model: CostModel
    ) -> PackingConfig:
        """How a model's rows are packed.

        Args:
            settings: budgets and residency.
            model: ``TransformerConfig``, whose parallel sizes are read.
            cost_model: of the model.

        Raises:
            ValueError: if prompts must be resident under a router loss of every whole sample.
        """
        choice = settings.prefix_resident
        if has_sample_losses(model):
            if choice == "always":
                raise ValueError(
                    "prefix_resident='always' with seq_aux_loss, which is of every whole sample: "
                    "resident prompts stand in rows of their own; use 'auto' or 'never', or "
                    "moe_router_load_balancing_type='aux_loss'"
                )
            choice = "never"
        sizes = ParallelSizes.from_config(model)
        return cls(
            max_tokens=settings.max_tokens_per_microbatch,
            pad_to_multiple=sizes.row_multiple,
            num_microbatches_multiple=sizes.microbatch_multiple,
            min_shared=settings.min_shared,
            cost_model=cost_model,
            residency=ResidencyConfig(
                choice=choice,
                mode=settings.prefix_resident_mode,
                max_resident_tokens=settings.max_tokens_per_microbatch
                if settings.max_resident_tokens is None
                else settings.max_resident_tokens,
                num_stages=sizes.pp,
            ),
        )


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
        split: tokens that stand once more since samples route them to other experts.
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
    split: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        both = ((f.name, getattr(self, f.name) + getattr(other, f.name)) for f in fields(self))
        return TokenCounts(**dict(both))


@dataclass(frozen=True, eq=False, kw_only=True)
class PlannedRows:
    """The rows of one minibatch.

    Attributes:
        waves: this replica's.
        tokens: over the rows of all replicas.
        predicted_cost: time of forward and backward on the slowest replica by the cost model, idle
            stages included, in forward FLOPs of one stage.
        predicted_cost_repeated: the same if every group that is larger than a row repeated its
            prompt; None when there is no such group, or no such way.
    """

    waves: tuple[PackPlan, ...]
    tokens: TokenCounts
    predicted_cost: float
    predicted_cost_repeated: float | None


def plan_rows_of_replica(
    shapes: Sequence[GroupShape],
    minibatches: Sequence[Sequence[int]],
    packing: PackingConfig,
    replicas: Replicas,
) -> list[PlannedRows]:
    """Rows of this replica's part of every minibatch, equally many on all replicas.

    Every replica plans its own groups and tells the others how many rows they take; a collective.

    Args:
        shapes: this replica's groups.
        minibatches: places in ``shapes`` of this replica's part of every minibatch.
        packing: decides the rows.
        replicas: of the model.

    Raises:
        ValueError: on every replica, if a group fits in no way.
    """
    planned = _plan(shapes, minibatches, packing, replicas)

    def measure() -> list[tuple[TokenCounts, float]]:
        return [(count_tokens(w), _cost(w, packing)) for w in planned]

    measured = replicas.gather(measure)
    tokens = [
        replace(sum((tokens for tokens, _ in parts), TokenCounts()), waves=parts[0][0].waves)
        for parts in zip(*measured)
    ]
    repeated: list[float | None] = [None] * len(tokens)
    if any(own.resident_groups or own.repeated_groups for own in tokens):
        repeated = _costs_if_repeated(shapes, minibatches, packing, replicas)
    return [
        PlannedRows(
            waves=tuple(waves),
            tokens=own,
            predicted_cost=max(cost for _, cost in parts),
            predicted_cost_repeated=again if own.resident_groups or own.repeated_groups else None,
        )
        for waves, own, parts, again in zip(planned, tokens, zip(*measured), repeated)
    ]


def plan_all_replicas(
    shapes: Sequence[GroupShape], dp_size: int, packing: PackingConfig
) -> list[list[PackPlan]]:
    """Waves of every replica for one minibatch, in one process; equals what the replicas plan.

    Raises:
        ValueError: if a group fits in no way.
    """
    parts = balance_groups(shapes, dp_size, packing.cost_model)
    planned = [_plan_alone(shapes, members, packing) for members in parts]
    sizes = [_sizes(waves) for waves in planned]
    return [_equalize(waves, shapes, sizes, packing) for waves in planned]


def _plan(
    shapes: Sequence[GroupShape],
    minibatches: Sequence[Sequence[int]],
    packing: PackingConfig,
    replicas: Replicas,
) -> list[list[PackPlan]]:
    planned: list[list[PackPlan]] = []

    def plan() -> list[list[tuple[int, int]]]:
        planned.extend(_plan_alone(shapes, members, packing) for members in minibatches)
        return [_sizes(waves) for waves in planned]

    sizes = replicas.gather(plan)
    return [_equalize(own, shapes, of_all, packing) for own, of_all in zip(planned, zip(*sizes))]


def _plan_alone(
    shapes: Sequence[GroupShape], members: Sequence[int], packing: PackingConfig
) -> list[PackPlan]:
    return plan_waves(
        shapes,
        packing.max_tokens,
        packing.residency,
        members=members,
        cost_model=packing.cost_model,
        pad_to_multiple=packing.pad_to_multiple,
    )


def _sizes(waves: Sequence[PackPlan]) -> list[tuple[int, int]]:
    """Rows and prefix rows of every wave."""
    return [(len(wave.rows), len(wave.prefix_rows)) for wave in waves]


def _equalize(
    waves: Sequence[PackPlan],
    shapes: Sequence[GroupShape],
    sizes: Sequence[Sequence[tuple[int, int]]],
    packing: PackingConfig,
) -> list[PackPlan]:
    """One replica's waves with the greatest numbers of waves and rows among all replicas."""
    empty = PackPlan(tuple(shapes), (), packing.pad_to_multiple)
    padded = [*waves, *[empty] * (max(map(len, sizes)) - len(waves))]
    at_wave = list(itertools.zip_longest(*sizes, fillvalue=(0, 0)))
    return [
        with_num_rows(
            wave,
            max(rows for rows, _ in of_all),
            max(prefix_rows for _, prefix_rows in of_all),
            multiple_of=packing.num_microbatches_multiple,
            cost_model=packing.cost_model,
        )
        for wave, of_all in zip(padded, at_wave, strict=True)
    ]


def _cost(waves: Sequence[PackPlan], packing: PackingConfig) -> float:
    return step_cost(waves, packing.residency, packing.cost_model)


def _costs_if_repeated(
    shapes: Sequence[GroupShape],
    minibatches: Sequence[Sequence[int]],
    packing: PackingConfig,
    replicas: Replicas,
) -> list[float | None]:
    repeating = replace(packing, residency=replace(packing.residency, choice="never"))
    costs: list[float | None] = []
    for members in minibatches:
        try:
            (waves,) = _plan(shapes, [members], repeating, replicas)
        except ValueError:
            # A sample is longer than a row: only residency can train it.
            costs.append(None)
        else:
            costs.append(max(replicas.gather(partial(_cost, waves, packing))))
    return costs


def count_tokens(waves: Sequence[PackPlan]) -> TokenCounts:
    """Tokens of one rank's waves, fillers' left out."""
    total = TokenCounts(waves=len(waves))
    places: dict[int, int] = {}
    for wave in waves:
        for row in wave.rows:
            unique = sum(part_tree(wave.shapes, part).unique_tokens for part in row)
            total += _row_counts(unique, wave, bool(row))
            for part in row:
                shape = wave.shapes[part.group]
                logical = int(shape.tree.sample_lens[list(part.samples)].sum())
                split = 0 if part.group in places else shape.split_tokens
                total += TokenCounts(logical=logical, split=split)
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
