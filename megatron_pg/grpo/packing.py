"""The rows of one replica, and as many of them on every other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from ..data import (
    GroupShape,
    PackPlan,
    balance_costs,
    plan_waves,
    step_cost,
    with_num_rows,
    with_rows_for_stages,
)
from .packing_config import PackingConfig
from .replicas import Replicas
from .token_counts import TokenCounts, count_tokens

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False, kw_only=True)
class PlannedRows:
    """The rows of one minibatch.

    Attributes:
        waves: this replica's.
        tokens: over the rows of all replicas.
        predicted_cost: time of forward and backward on the slowest replica by the cost model, idle
            stages included, in forward FLOPs of one stage's products.
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
    shapes: Sequence[GroupShape],
    dp_size: int,
    packing: PackingConfig,
    minibatches: Sequence[Sequence[int]] | None = None,
) -> list[list[PackPlan]]:
    """Waves of every replica for a step, in one process; equals what the replicas plan.

    Args:
        shapes: of the step's groups, in order.
        dp_size: replicas.
        packing: decides the rows.
        minibatches: places in ``shapes`` of every optimizer step's groups, whose waves follow each
            other (see ``trained_minibatches``); None takes one of all groups.

    Raises:
        ValueError: if a group fits in no way.
    """
    shapes = tuple(shapes)
    waves: list[list[PackPlan]] = [[] for _ in range(dp_size)]
    for part in [range(len(shapes))] if minibatches is None else minibatches:
        costs = [packing.group_cost(shapes[group]) for group in part]
        members = [[part[i] for i in own] for own in balance_costs(costs, dp_size)]
        planned = [_plan_alone(shapes, own, packing) for own in members]
        most = _most_rows([_sizes(own) for own in planned])
        for all_waves, own in zip(waves, planned):
            all_waves += _equalize(own, shapes, most, packing)
    return waves


def split_evenly(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Items in order, in ``count`` runs as even as can be, or fewer so that none is empty."""
    count = min(count, len(items))
    bounds = [len(items) * i // count for i in range(count + 1)] if items else []
    return [list(items[a:b]) for a, b in zip(bounds, bounds[1:])]


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
    most = [_most_rows(of_all) for of_all in zip(*sizes)]
    return [_equalize(own, shapes, of_all, packing) for own, of_all in zip(planned, most)]


def _plan_alone(
    shapes: Sequence[GroupShape], members: Sequence[int], packing: PackingConfig
) -> list[PackPlan]:
    waves = plan_waves(
        shapes,
        packing.max_tokens,
        packing.residency,
        members=members,
        cost_model=packing.cost_model,
        pad_to_multiple=packing.pad_to_multiple,
    )
    stages = packing.residency.num_stages
    return [with_rows_for_stages(wave, stages, packing.cost_model) for wave in waves]


def _sizes(waves: Sequence[PackPlan]) -> list[tuple[int, int]]:
    """Rows and prefix rows of every wave."""
    return [(len(wave.rows), len(wave.prefix_rows)) for wave in waves]


def _most_rows(sizes: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Of every wave the greatest numbers of rows and prefix rows, among all replicas' ``sizes``."""
    at_wave = itertools.zip_longest(*sizes, fillvalue=(0, 0))
    return [(max(n for n, _ in of_all), max(n for _, n in of_all)) for of_all in at_wave]


def _equalize(
    waves: Sequence[PackPlan],
    shapes: Sequence[GroupShape],
    most: Sequence[tuple[int, int]],
    packing: PackingConfig,
) -> list[PackPlan]:
    """One replica's waves, as many as ``most`` and with as many rows."""
    empty = PackPlan(tuple(shapes), (), packing.pad_to_multiple)
    padded = [*waves, *[empty] * (len(most) - len(waves))]
    return [
        with_num_rows(
            wave,
            num_rows,
            num_prefix_rows,
            multiple_of=packing.num_microbatches_multiple,
            cost_model=packing.cost_model,
        )
        for wave, (num_rows, num_prefix_rows) in zip(padded, most, strict=True)
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
