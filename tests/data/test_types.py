"""Responses that train nothing, and rollouts of several samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_pg.data import (
    Group,
    carried_fields,
    content_checksum,
    group_tree,
    pack_groups,
    without_aborted,
)
from tests.data.samples import make_sample


@pytest.mark.parametrize("status", ["completed", "truncated", "aborted"])
def test_an_empty_response_is_an_aborted_one(status):
    empty = replace(make_sample([1], []), status=status)
    assert empty.status == "aborted" and empty.num_loss_tokens == 0
    assert empty.tokens.tolist() == [1]


def test_an_aborted_response_keeps_its_tokens_and_trains_none():
    aborted = replace(make_sample([1], [2, 3], rollout_logprobs=[-1, -1]), status="aborted")
    assert not aborted.loss_mask.any() and aborted.tokens.tolist() == [1, 2, 3]
    assert replace(aborted, loss_mask=torch.tensor([True, True])).num_loss_tokens == 0


def test_a_prompt_needs_a_token():
    with pytest.raises(ValueError, match="prompt_ids must be .* at least 1 tokens"):
        make_sample([], [1])


def test_a_status_that_is_none_is_refused():
    with pytest.raises(ValueError, match="status='done' must be one of completed, truncated, ab"):
        replace(make_sample([1], [2]), status="done")


def test_without_aborted_keeps_order_and_whole_groups():
    kept, aborted, empty = (make_sample([1], r) for r in ([2], [3], []))
    aborted = replace(aborted, status="aborted")
    whole = Group("whole", (kept, kept))
    groups = [Group("a", (aborted, kept, empty)), Group("none", (empty, aborted)), whole]
    (first, second) = without_aborted(groups)
    assert (first.group_id, first.samples) == ("a", (kept,)) and second is whole


def test_values_are_carried_by_the_samples_that_train():
    full = make_sample([1], [2], old_logprobs=[-1.0], advantages=[1.0])
    masked = replace(make_sample([1], [2]), loss_mask=torch.tensor([False]))
    bare = [make_sample([1], []), replace(make_sample([1], [2]), status="aborted"), masked]
    assert carried_fields([Group("g", (*bare, full))]) == ("old_logprobs", "advantages")
    assert carried_fields([Group("g", tuple(bare))]) == ()
    (row,) = pack_groups([Group("g", (*bare, full))], 40)
    assert row.advantages.tolist() == [1.0] and row.old_logprobs.tolist() == [-1.0]
    # Nothing is trained, so nothing has to be known.
    (row,) = pack_groups([Group("g", tuple(bare))], 40)
    assert row.num_loss_tokens == len(row.advantages) == 0


@pytest.mark.parametrize("min_shared", [None, 1, 2])
def test_a_sample_without_response_ends_at_its_prompt(min_shared):
    samples = tuple(make_sample([1, 2], response) for response in ([], [3], []))
    tree = group_tree(Group("g", samples), min_shared)
    assert tree.segment_lens.tolist() == [2, 1] and tree.sample_segments.tolist() == [0, 1, 0]
    alone = group_tree(Group("g", samples[:1]), min_shared)
    assert alone.segment_lens.tolist() == [2] and alone.sample_lens.tolist() == [2]


@pytest.mark.parametrize(
    "ids", [["a", None, "b", "a", None, "b"], [4, None, 1, 4, None, 1], [0, None, "", 0, None, ""]]
)
def test_rollouts_are_numbered_within_a_group(ids: list[Any]):
    sample = make_sample([1], [2])
    samples = tuple(replace(sample, rollout_id=i) for i in ids)
    group = Group("g", samples)
    assert group.rollouts.tolist() == [0, 1, 2, 0, 3, 2]
    named = tuple(replace(s, rollout_id=f"r{n}") for s, n in zip(samples, [0, 1, 2, 0, 3, 2]))
    assert content_checksum([group]) == content_checksum([Group("g", named)])
