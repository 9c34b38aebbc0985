"""The parts of a group that is larger than a row: each repeats what its samples share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..shape import GroupShape

Parts = tuple[tuple[int, ...], ...]
Path = list[int]


def split_group(shape: GroupShape, budget: int) -> Parts:
    """The samples of every part, ascending: one part when the group fits into ``budget`` tokens.

    A part repeats the segments that its samples need. Of two ways the one that repeats less: long
    samples first, each into the part where it adds the fewest tokens; and, where samples share
    more than a prompt, runs of neighbours in the tree, cut where the fewest tokens are repeated.

    Raises:
        ValueError: if one sample alone is longer than the budget.
    """
    tree = shape.tree
    if tree.unique_tokens <= budget:
        return (tuple(range(tree.num_samples)),)
    longest = int(tree.sample_lens.argmax())
    if tree.sample_lens[longest] > budget:
        raise ValueError(
            f"sample {longest} of group {shape.group_id!r} has {tree.sample_lens[longest]} tokens, "
            f"a row holds {budget}; raise max_tokens or truncate the sample"
        )
    paths = [tree.segment_path(segment).tolist() for segment in tree.sample_segments.tolist()]
    ways = [_longest_first(shape, paths, budget)]
    if tree.depth > 1:
        ways.append(_neighbours(shape, paths, budget))
    best = min(ways, key=lambda parts: sum(shape.tokens(part) for part in parts))
    return tuple(sorted(tuple(sorted(part)) for part in best))


def _longest_first(shape: GroupShape, paths: Sequence[Path], budget: int) -> list[list[int]]:
    sample_lens, lens = shape.tree.sample_lens, shape.tree.segment_lens.tolist()
    parts: list[list[int]] = []
    held: list[set[int]] = []
    free: list[int] = []
    for sample in np.argsort(-sample_lens, kind="stable").tolist():
        path = paths[sample]
        added = [sum(lens[s] for s in path if s not in segments) for segments in held]
        fitting = [i for i, tokens in enumerate(added) if tokens <= free[i]]
        if fitting:
            best = min(fitting, key=added.__getitem__)
        else:
            best = len(parts)
            parts.append([])
            held.append(set())
            free.append(budget)
            added.append(int(sample_lens[sample]))
        parts[best].append(sample)
        held[best].update(path)
        free[best] -= added[best]
    return parts


def _neighbours(shape: GroupShape, paths: Sequence[Path], budget: int) -> list[list[int]]:
    """Runs of samples in pre-order with the fewest tokens in all that runs can have."""
    tree = shape.tree
    order = np.argsort(tree.sample_segments, kind="stable").tolist()
    whole = tree.sample_lens[order].tolist()
    # What a sample adds to a run that holds the one before it.
    lens, added = tree.segment_lens.tolist(), list(whole)
    for i in range(1, len(order)):
        before = set(paths[order[i - 1]])
        added[i] -= sum(lens[segment] for segment in paths[order[i]] if segment in before)
    # Of the first i samples: the fewest tokens, and where their last run begins.
    fewest: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        rest, ways = 0, []
        for start in range(end - 1, -1, -1):
            # A run has its first sample whole.
            tokens = whole[start] + rest
            if tokens > budget:
                break
            ways.append((fewest[start][0] + tokens, start))
            rest += added[start]
        fewest.append(min(ways))
    runs, end = [], len(order)
    while end:
        start = fewest[end][1]
        runs.append(order[start:end])
        end = start
    return runs
