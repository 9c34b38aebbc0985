"""What rows of one rollout share, and what they count."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_pg.data import (
    Group,
    Sample,
    content_checksum,
    group_shape,
    group_tree,
    pack_groups,
    read_rollouts,
    write_rollouts,
)
from tests.data.forests import AGENT, HELPER, forest_groups
from tests.data.samples import assert_same_groups, make_sample


def rollout(name: str | None, *rows: Sample) -> tuple[Sample, ...]:
    return tuple(replace(row, rollout_id=name) for row in rows)


def test_forests_hold_the_interesting_cases() -> None:
    """Every kind of row, in enough of the seeds that others draw from."""
    found: Counter[str] = Counter()
    for group in (g for seed in range(10) for g in forest_groups(seed)):
        rows = [tuple(s.tokens.tolist()) for s in group.samples]
        masks = [tuple(s.loss_mask.tolist()) for s in group.samples]
        found["roots"] += len({row[0] for row in rows}) == 2
        found["equal"] += len(set(zip(rows, masks))) < len(rows)
        found["start"] += any(a != b and b[: len(a)] == a for a in rows for b in rows)
        found["untrained"] += not all(any(mask) for mask in masks)
        found["holes"] += any((True, False) in zip(mask, mask[1:]) for mask in masks)
        tree = group_tree(group, 1)
        found["deep"] += tree.depth > 2
        found["inner"] += bool(np.isin(tree.sample_segments, tree.segment_parents).any())
        trained: dict[int, set[bool]] = {}
        for i, sample in enumerate(group.samples):
            path = tree.segment_path(int(tree.sample_segments[i]))
            places = np.concatenate(
                [np.arange(tree.segment_starts[s], tree.segment_ends[s]) for s in path]
            )
            for place, flag in zip(places[len(sample.prompt_ids) :], sample.loss_mask.tolist()):
                trained.setdefault(int(place), set()).add(flag)
        found["trained in one"] += any(len(flags) == 2 for flags in trained.values())
        assert {row[0] for row in rows} <= {AGENT, HELPER} and max(map(len, rows)) <= 40
    assert min(found.values()) >= 5 and len(found) == 8, found


TURN = make_sample([1, 2, 3, 4], [5, 6])
NEXT = make_sample([1, 2, 3, 4, 5, 6, 7], [8])
LONG = make_sample(range(1, 101), [5])


@pytest.mark.parametrize(
    ("samples", "unique"),
    [
        # Turns: the second row's tokens alone, since the first is its start.
        (rollout("a", TURN, NEXT), 8),
        # Said apart they are two samples of two prompts, which share nothing by themselves.
        ((TURN, NEXT), 6 + 8),
        # Another rollout shares the prompt, and what follows it as far as it goes on alike.
        ((*rollout("a", TURN, NEXT), make_sample([1, 2, 3, 4], [5, 9])), 8 + 1),
        ((*rollout("a", TURN, NEXT), make_sample([1, 2, 3, 4], [9])), 8 + 1),
        # Two tokens that a context has in common are fewer than the shortest prompt has.
        (rollout("a", TURN, make_sample([1, 2, 9, 9], [3])), 6 + 5),
        (rollout("a", LONG, make_sample([*range(1, 81), 9], [3])), 101 + 2),
        # Of long prompts 64 tokens are worth a segment, and 63 are not.
        (rollout("a", LONG, make_sample([*range(1, 65), *[9] * 40], [3])), 101 + 41),
        (rollout("a", LONG, make_sample([*range(1, 64), *[9] * 41], [3])), 101 + 105),
        (rollout("a", TURN, TURN), 6),
        (rollout("a", TURN, make_sample([9, 2, 3, 4], [5])), 6 + 5),
    ],
    ids=["turns", "apart", "group", "prompt", "short", "compacted", "64", "63", "equal", "roots"],
)
def test_what_rows_of_a_rollout_share_is_found(samples: tuple[Sample, ...], unique: int) -> None:
    tree = group_tree(Group("g", samples))
    assert tree.unique_tokens == unique
    assert tree.sample_lens.tolist() == [len(sample.tokens) for sample in samples]


def test_masks_alone_say_what_is_trained() -> None:
    """A turn's response is trained in its row, and context in the next."""
    samples = rollout("a", TURN, NEXT, replace(NEXT, loss_mask=torch.tensor([False])))
    (row,) = pack_groups([Group("g", samples)], 40, advantages=torch.tensor([1.0, 2.0, 3.0]))
    assert row.layout.unique_tokens == 8 and row.num_loss_tokens == 3
    assert row.sample_ids.tolist() == [0, 0, 1] and row.positions.tolist() == [4, 5, 7]
    twice = rollout("a", TURN, TURN)
    (row,) = pack_groups([Group("g", twice)], 40, advantages=torch.tensor([1.0, 2.0]))
    assert row.num_loss_tokens == 4 and len(row.target_ids) == 2


def test_what_is_trained_early_is_not_resident() -> None:
    """The start of a root up to the first trained token, whichever row trains it."""
    helper = make_sample([9, 2, 3], [4, 5], mask=[0, 1])
    shape = group_shape(Group("g", rollout("a", TURN, NEXT, helper)))
    assert shape.tree.segment_lens.tolist() == [6, 2, 5]
    assert shape.resident_lens.tolist() == [3, 0, 3]


def test_loss_weights_come_from_files(tmp_path) -> None:
    groups = forest_groups(3, has_values=True, is_weighted=True)
    write_rollouts(groups, tmp_path / "r.jsonl")
    again = read_rollouts(tmp_path / "r.jsonl")
    assert_same_groups(again, groups)
    assert content_checksum(again) == content_checksum(groups)
    first, *others = groups[0].samples
    other = replace(groups[0], samples=(replace(first, loss_weight=7.0), *others))
    assert content_checksum([other]) != content_checksum(groups[:1])
    with pytest.raises(ValueError, match="pass sample_weights="):
        pack_groups(groups, 200)
    weights = torch.ones(sum(len(g.samples) for g in groups))
    assert pack_groups(groups, 200, sample_weights=weights)


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_a_loss_weight_is_a_number_above_0(weight) -> None:
    with pytest.raises(ValueError, match="loss_weight=.* must be finite and above 0"):
        replace(TURN, loss_weight=weight)
