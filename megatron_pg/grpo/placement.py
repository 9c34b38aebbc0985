"""Which replica packs which groups, and the way of their tokens there."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data import (
    Group,
    GroupShape,
    RouteShape,
    balance_costs,
    group_shape,
    without_aborted,
    without_routes,
)
from .messages import Numbered, decode_groups, encode_groups
from .packing import split_evenly
from .packing_config import PackingConfig
from .replicas import Replicas
from .settings import GrpoConfig
from .shape import IntArray, StepShape, join_shapes


@dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """The groups of a step, each with all its tokens on the one replica that packs it.

    Attributes:
        rollout: of all groups that were brought.
        shape: of those that are judged: without aborted samples.
        minibatches: judged groups of every optimizer step, ascending; none without trained tokens.
        left_out: judged groups that no optimizer step trains.
        num_skipped: groups left out for their rewards, or because nothing can be whitened.
        groups: this replica's, by number in ``shape``, in the order of ``minibatches`` and
            ``left_out``.
        shapes: of ``groups``, in their order.
        parts: places in ``groups`` of this replica's part of every minibatch, then of ``left_out``.
    """

    rollout: StepShape
    shape: StepShape
    minibatches: tuple[tuple[int, ...], ...]
    left_out: tuple[int, ...]
    num_skipped: int
    groups: Mapping[int, Group]
    shapes: tuple[GroupShape, ...]
    parts: tuple[range, ...]


def place_groups(
    groups: Mapping[int, Group] | Sequence[Group],
    algorithm: GrpoConfig,
    packing: PackingConfig,
    replicas: Replicas,
    *,
    num_groups: int | None = None,
    vocab_size: int | None = None,
    routes: RouteShape | None = None,
) -> Placement:
    """Bring every group to the replica that packs it; a collective of all ranks.

    Ranks tell each other the numbers of ``StepShape``; tokens go only to where they are packed.

    Args:
        groups: what this rank brings; only those of a replica's first rank count. By number within
            the rollout of all replicas, or in order, after those of the replicas before.
        algorithm: divides the step into minibatches.
        packing: what groups cost.
        replicas: of the model.
        num_groups: place only the first so many of the judged groups; None places all.
        vocab_size: token ids must lie below; None does not look at them.
        routes: of the model, where those of the samples are replayed; None drops them.

    Raises:
        ValueError: on every rank: if there are no groups, a group is brought twice, is none or has
            a token that is not of the vocabulary or a route that is not of the model, if some
            replicas number their groups and others do not, or if some samples carry a kind of
            values and others do not.
    """
    held: list[Numbered] = []

    def bring() -> _Brought:
        by_number = _numbered(groups, vocab_size, routes)
        brought, mine = _describe(by_number, not isinstance(groups, Mapping), packing)
        held.extend(mine)
        return brought

    told = replicas.share(lambda: replicas.gather(bring))
    if len({one.is_in_order for one in told if len(one.numbers)}) > 1:
        raise ValueError(
            "some replicas brought their groups by number and others in order; bring them one way"
        )
    # Groups that were given in order stand after those of the replicas before.
    counts = [len(one.numbers) if one.is_in_order else 0 for one in told]
    firsts = (np.cumsum(counts) - counts).tolist()
    rollout = join_shapes([(one.numbers + n, one.rollout) for n, one in zip(firsts, told)])
    shape = join_shapes([(one.judged_numbers + n, one.judged) for n, one in zip(firsts, told)])
    if not len(rollout.group_ids):
        raise ValueError("no replica brought a group; bring at least one to every step")
    order = np.sort(np.concatenate([one.judged_numbers + n for n, one in zip(firsts, told)]))
    shape, order = shape.take(range(len(order))[:num_groups]), order[:num_groups]
    minibatches, left_out, num_skipped = _minibatches(shape, algorithm)
    owners = _owners(shape, [*minibatches, left_out], replicas.size)
    first = firsts[replicas.rank]
    places = {int(number): place for place, number in enumerate(order)}
    mine = [(places[first + n], g, own) for n, g, own in held if first + n in places]
    arrived = {n: (group, own) for n, group, own in _move(mine, owners, replicas)}
    parts = [[g for g in part if owners[g] == replicas.rank] for part in [*minibatches, left_out]]
    ends = np.cumsum([0] + [len(part) for part in parts]).tolist()
    chosen = [g for part in parts for g in part]
    return Placement(
        rollout=rollout,
        shape=shape,
        minibatches=minibatches,
        left_out=left_out,
        num_skipped=num_skipped,
        groups={g: arrived[g][0] for g in chosen},
        shapes=tuple(arrived[g][1] for g in chosen),
        parts=tuple(range(a, b) for a, b in zip(ends, ends[1:])),
    )


def trained_minibatches(
    groups: Sequence[Group], algorithm: GrpoConfig
) -> tuple[tuple[int, ...], ...]:
    """Places of the groups of every optimizer step that ``place_groups`` makes of judged ones."""
    return _minibatches(StepShape.of(groups), algorithm)[0]


def written_out(placement: Placement) -> Placement:
    """Every sample as a group of its own, where it stood: the same tokens with nothing shared."""
    shape = placement.shape
    everything = tuple(range(len(shape.rewards)))
    numbers = shape.samples_of(list(placement.groups)).tolist()
    alone = [
        replace(group, group_id=f"{group.group_id}/{i}", samples=(sample,))
        for group in placement.groups.values()
        for i, sample in enumerate(group.samples)
    ]
    is_trained = shape.is_trained.any()
    parts = (range(len(alone)), range(0)) if is_trained else (range(len(alone)),)
    return replace(
        placement,
        shape=shape.written_out(),
        minibatches=(everything,) if is_trained else (),
        left_out=() if is_trained else everything,
        groups=dict(zip(numbers, alone)),
        shapes=tuple(group_shape(group) for group in alone),
        parts=parts,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Brought:
    """What a replica tells of its groups; ``judged`` is without aborted samples."""

    is_in_order: bool
    numbers: IntArray
    rollout: StepShape
    judged_numbers: IntArray
    judged: StepShape


def _numbered(
    groups: Mapping[int, Group] | Sequence[Group],
    vocab_size: int | None,
    routes: RouteShape | None,
) -> dict[int, Group]:
    """Groups by number, after all that can be refused of one was looked at."""
    if not isinstance(groups, Mapping | Sequence):
        raise ValueError(
            f"groups is a {type(groups).__name__}; bring a list of Group, or Group by number"
        )
    found = dict(groups) if isinstance(groups, Mapping) else dict(enumerate(groups))
    for number, group in found.items():
        if not isinstance(number, int | np.integer) or not isinstance(group, Group):
            raise ValueError(
                f"groups[{number!r}] is a {type(group).__name__}; bring Group values, in a list "
                "or by their whole number within the step"
            )
        if vocab_size is not None:
            _check_tokens(group, vocab_size)
        found[number] = without_routes(group) if routes is None else routes.of_group(group)
    return found


def _check_tokens(group: Group, vocab_size: int) -> None:
    for sample in group.samples:
        ids = torch.cat([sample.prompt_ids, sample.response_ids])
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"group {group.group_id!r} has token {low if low < 0 else high}, must lie in "
                f"[0, vocab_size), vocab_size is {vocab_size}"
            )


def _describe(
    by_number: Mapping[int, Group], is_in_order: bool, packing: PackingConfig
) -> tuple[_Brought, list[Numbered]]:
    pairs = sorted(by_number.items(), key=lambda pair: pair[0])
    judged = [(n, kept) for n, group in pairs for kept in without_aborted([group])]
    shapes = [group_shape(group, packing.min_shared) for _, group in judged]
    kept = [group for _, group in judged]
    all_groups = [group for _, group in pairs]
    shape = StepShape.of(kept, [packing.group_cost(shape) for shape in shapes])
    # Told once where no sample is aborted.
    is_same = len(kept) == len(all_groups) and all(map(operator.is_, kept, all_groups))
    brought = _Brought(
        is_in_order=is_in_order,
        numbers=np.array([n for n, _ in pairs], dtype=np.int64),
        rollout=shape if is_same else StepShape.of(all_groups),
        judged_numbers=np.array([n for n, _ in judged], dtype=np.int64),
        judged=shape,
    )
    return brought, [(n, group, shape) for (n, group), shape in zip(judged, shapes)]


def _minibatches(
    shape: StepShape, algorithm: GrpoConfig
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...], int]:
    """Groups of every optimizer step, the groups that none trains, and how many were skipped.

    A minibatch without trained tokens has no loss. A step whose rewards cannot be whitened, as
    fewer than two tokens are trained, has no advantages.
    """
    kept = list(range(len(shape.group_ids)))
    if algorithm.skip_groups_without_spread:
        kept = [group for group in kept if shape.has_spread[group]]
    can_whiten = int(shape.loss_lens.sum()) >= 2
    if algorithm.whitens and not can_whiten and "advantages" not in (shape.carried or ()):
        kept = []
    parts = split_evenly(kept, algorithm.num_minibatches)
    trained = tuple(tuple(part) for part in parts if shape.is_trained[part].any())
    count = len(shape.group_ids)
    others = set(range(count)) - {group for part in trained for group in part}
    return trained, tuple(sorted(others)), count - len(kept)


def _owners(shape: StepShape, parts: Sequence[Sequence[int]], dp_size: int) -> IntArray:
    """``[G]`` replica that packs each group: every part is divided evenly by itself."""
    owners = np.zeros(len(shape.group_ids), dtype=np.int64)
    for part in parts:
        for rank, members in enumerate(balance_costs(shape.costs[list(part)].tolist(), dp_size)):
            owners[[part[i] for i in members]] = rank
    return owners


def _move(held: Sequence[Numbered], owners: IntArray, replicas: Replicas) -> list[Numbered]:
    """Groups that this replica packs, out of those that the replicas hold."""
    packed = [entry for entry in held if owners[entry[0]] == replicas.rank]
    if replicas.size > 1:
        parts = [
            encode_groups([e for e in held if owners[e[0]] == rank])
            if rank != replicas.rank
            else b""
            for rank in range(replicas.size)
        ]
        packed += [entry for part in replicas.exchange(parts) for entry in decode_groups(part)]
    if replicas.num_ranks > 1:
        content = replicas.share(lambda: encode_groups(packed))
        packed = packed if replicas.leads else decode_groups(content)
    return packed
