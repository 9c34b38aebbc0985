"""Whole groups on data-parallel ranks, as many samples on each: what verl's default divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...data import CostModel
from ...tree import PrefixTree


def place_samples(
    keys: Sequence[str], tags: Sequence[Mapping[str, Any]], *, num_ranks: int, mini_batch_size: int
) -> list[list[int]]:
    """Samples of every data-parallel rank, mini-batch after mini-batch, whole groups together.

    Mini-batches take groups in the order of the rollout. Within one, the ranks get equally many
    samples and nearly equal costs of unique tokens and attention pairs. A group is divided only
    where equal numbers cannot be had otherwise.

    Args:
        keys: ``{uid}_{session}_{turn}`` of every sample, as verl's rollout names them.
        tags: with ``prompt_len`` and ``response_len`` of every sample.
        num_ranks: data-parallel ranks.
        mini_batch_size: samples of an optimizer step, a multiple of ``num_ranks``; the number of
            samples is a multiple of it.
    """
    groups: dict[str, list[int]] = {}
    for sample, key in enumerate(keys):
        # Samples that only fill up a batch share nothing worth keeping together.
        name = key if tags[sample].get("is_padding") else key.rsplit("_", 2)[0]
        groups.setdefault(name, []).append(sample)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    whole = list(groups.values())
    for of_step in deal(whole, [0.0] * len(whole), len(keys) // mini_batch_size):
        costs = [group_cost(members, keys, tags) for members in of_step]
        for rank, members in zip(ranks, deal(of_step, costs, num_ranks)):
            rank += [sample for group in members for sample in group]
    return ranks


def group_cost(
    members: Sequence[int], keys: Sequence[str], tags: Sequence[Mapping[str, Any]]
) -> float:
    """Cost of a group by its lengths; turns of one session continue each other."""
    prompt = min(int(tags[sample]["prompt_len"]) for sample in members)
    longest: dict[str, int] = {}
    for sample in members:
        session, _ = keys[sample].rsplit("_", 1)
        length = int(tags[sample]["prompt_len"]) + int(tags[sample]["response_len"])
        longest[session] = max(longest.get(session, 0), length)
    suffixes = [max(length - prompt, 1) for length in longest.values()]
    loss_tokens = sum(int(tags[sample]["response_len"]) for sample in members)
    return CostModel().estimate(PrefixTree.from_group(max(prompt, 1), suffixes), loss_tokens)


def deal(
    groups: Sequence[Sequence[int]], costs: Sequence[float], num_parts: int
) -> list[list[list[int]]]:
    """Groups of every part, as many samples in each and nearly equal costs; few are divided.

    The dearest first, each into the cheapest part with room for it; what then fits nowhere is
    divided over the parts with most room. Without costs, groups stay in order.

    Args:
        groups: samples of every group; their number is a multiple of ``num_parts``.
        costs: of every group.
        num_parts: how many parts.
    """
    size = sum(map(len, groups)) // num_parts
    # What no part holds is divided first.
    pieces = [
        (cost * len(piece) / len(group), piece)
        for group, cost in zip(groups, costs)
        for piece in _cut(list(group), size)
    ]
    room, loads = [size] * num_parts, [0.0] * num_parts
    parts: list[list[list[int]]] = [[] for _ in range(num_parts)]
    left = []
    for cost, piece in sorted(pieces, key=lambda entry: -entry[0]):
        fitting = [part for part in range(num_parts) if room[part] >= len(piece)]
        if not fitting:
            left.append(piece)
            continue
        part = min(fitting, key=lambda p: (loads[p], p))
        parts[part].append(piece)
        room[part] -= len(piece)
        loads[part] += cost
    for rest in left:
        while rest:
            part = max(range(num_parts), key=lambda p: (room[p], -p))
            parts[part].append(rest[: room[part]])
            rest = rest[room[part] :]
            room[part] -= len(parts[part][-1])
    return parts


def _cut(group: list[int], size: int) -> list[list[int]]:
    return [group[start : start + size] for start in range(0, len(group), size)]
