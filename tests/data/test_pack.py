"""Microbatches against enumeration of every trained token of every written-out sample."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_pg.data import (
    Group,
    Microbatch,
    PackPlan,
    make_microbatches,
    pack_groups,
    plan_rows,
)
from tests.data.forests import forest_groups
from tests.data.samples import make_sample, random_groups, shapes_of

BUDGET = 40


def flat_samples(groups):
    return [sample for group in groups for sample in group.samples]


def entries_of(microbatch: Microbatch):
    """(sample number, position, predictor index, target, weight, advantage, old) per entry."""
    return list(
        zip(
            microbatch.sample_numbers[microbatch.sample_ids].tolist(),
            microbatch.positions.tolist(),
            microbatch.predictor_ids[microbatch.prediction_ids].tolist(),
            microbatch.target_tokens[microbatch.prediction_ids].tolist(),
            microbatch.weights.tolist(),
            microbatch.advantages.tolist(),
            microbatch.old_logprobs.tolist(),
        )
    )


def entries_by_enumeration(microbatch: Microbatch, groups, weights):
    samples, entries = flat_samples(groups), []
    for local, number in enumerate(microbatch.sample_numbers.tolist()):
        sample, path = samples[number], microbatch.layout.sample_indices(local).tolist()
        prompt_len = len(sample.prompt_ids)
        for j, is_trained in enumerate(sample.loss_mask.tolist()):
            if is_trained:
                entries.append(
                    (
                        number,
                        prompt_len + j,
                        path[prompt_len + j - 1],
                        int(sample.response_ids[j]),
                        float(weights[number]),
                        float(sample.advantages[j]),
                        float(sample.old_logprobs[j]),
                    )
                )
    return entries


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_groups=st.integers(1, 8),
    min_shared=st.sampled_from([None, 1, 2, 4]),
    pad_to_multiple=st.sampled_from([1, 4]),
    same_prompt=st.booleans(),
    has_empty=st.booleans(),
    is_forest=st.booleans(),
)
def test_microbatches_equal_enumeration(
    seed, num_groups, min_shared, pad_to_multiple, same_prompt, has_empty, is_forest
):
    groups = random_groups(seed, num_groups, same_prompt=same_prompt, has_empty=has_empty)
    if is_forest:
        groups += forest_groups(seed, 2, vocab_size=6, has_values=True)
    # Of a batch that trains nothing no values are known.
    assume(any(sample.num_loss_tokens for sample in flat_samples(groups)))
    samples = flat_samples(groups)
    weights = torch.rand(len(samples), dtype=torch.float64)
    microbatches = pack_groups(
        groups,
        BUDGET,
        sample_weights=weights,
        min_shared=min_shared,
        pad_to_multiple=pad_to_multiple,
        pad_id=1,
    )
    numbers = sorted(n for mb in microbatches for n in mb.sample_numbers.tolist())
    assert numbers == list(range(len(samples)))
    for mb in microbatches:
        assert mb.layout.total_tokens <= BUDGET
        assert mb.layout.total_tokens % pad_to_multiple == 0
        for local, number in enumerate(mb.sample_numbers.tolist()):
            path = mb.layout.sample_indices(local)
            assert torch.equal(mb.tokens[path], samples[number].tokens)
        assert (mb.tokens[mb.layout.unique_tokens :] == 1).all()
        assert entries_of(mb) == entries_by_enumeration(mb, groups, weights)
        # Every prediction is read, and no packed token is predicted twice.
        assert sorted(set(mb.prediction_ids.tolist())) == list(range(len(mb.target_tokens)))
        targets = {(e, p) for e, p in zip(mb.prediction_ids.tolist(), mb.positions.tolist())}
        assert len(targets) == len(mb.target_tokens)
    total = sum(float(mb.weights.sum()) for mb in microbatches)
    want = sum(float(w) * s.num_loss_tokens for w, s in zip(weights, samples))
    assert total == pytest.approx(want, rel=1e-12)


def test_the_enumeration_meets_the_interesting_cases():
    merged = split = masked = 0
    empty = flat_samples(random_groups(3, 30, has_empty=True))
    assert {s.old_logprobs is None for s in empty if not len(s.response_ids)} == {True, False}
    for seed in range(20):
        groups = random_groups(seed, 6)
        for mb in pack_groups(groups, BUDGET, min_shared=1):
            merged += mb.num_loss_tokens - len(mb.target_tokens)
            split += len(mb.layout.tree_sample_offsets) > 2
        masked += sum(int((~s.loss_mask).sum()) for s in flat_samples(groups))
    assert merged > 50 and split > 20 and masked > 50


def test_equal_responses_stay_separate_unless_detected():
    group = Group("g", tuple(make_sample([7, 8], [1, 2], advantages=[a, a]) for a in (1.0, -1.0)))
    (apart,) = pack_groups([group], 100)
    assert (apart.layout.unique_tokens, len(apart.target_tokens), apart.num_loss_tokens) == (
        6,
        4,
        4,
    )
    (merged,) = pack_groups([group], 100, min_shared=1)
    assert (merged.layout.unique_tokens, len(merged.target_tokens), merged.num_loss_tokens) == (
        4,
        2,
        4,
    )
    assert merged.prediction_ids.tolist() == [0, 1, 0, 1]
    assert merged.advantages.tolist() == [1.0, 1.0, -1.0, -1.0]


def test_groups_with_equal_prompts_are_never_merged():
    groups = [Group(name, (make_sample([7, 8, 9], [1], advantages=[0.0]),)) for name in "ab"]
    for min_shared in (None, 1):
        (microbatch,) = pack_groups(groups, 100, min_shared=min_shared)
        assert microbatch.layout.num_trees == 2
        assert microbatch.layout.unique_tokens == 8


def test_pad_id_inside_the_prompt_is_an_ordinary_token():
    group = Group("g", (make_sample([0, 5, 0], [0, 6], advantages=[1.0, 2.0]),))
    (microbatch,) = pack_groups([group], 16, pad_to_multiple=8, pad_id=0)
    assert microbatch.tokens.tolist() == [0, 5, 0, 0, 6, 0, 0, 0]
    assert microbatch.target_tokens.tolist() == [0, 6]
    assert microbatch.predictor_ids.tolist() == [2, 3]


def test_untrained_tokens_stay_in_the_row():
    sample = make_sample([1], [2, 3, 4], mask=[1, 0, 1], advantages=[1.0, 2.0, 3.0])
    (microbatch,) = pack_groups([Group("g", (sample,))], 8)
    assert microbatch.tokens.tolist() == [1, 2, 3, 4]
    assert microbatch.target_tokens.tolist() == [2, 4]
    assert microbatch.positions.tolist() == [1, 3]
    assert microbatch.advantages.tolist() == [1.0, 3.0]


def test_default_weight_is_the_token_mean_of_the_global_batch():
    groups = random_groups(3, 6)
    num_loss_tokens = sum(s.num_loss_tokens for s in flat_samples(groups))
    own = pack_groups(groups, BUDGET, members=[1, 4])
    assert len(own) >= 1
    for microbatch in own:
        assert (microbatch.weights == 1 / num_loss_tokens).all()


def test_members_keep_their_place_in_the_global_batch():
    groups = random_groups(5, 6)
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group.samples))
    advantages = torch.arange(offsets[-1])
    want = {n for g in (1, 4) for n in range(offsets[g], offsets[g + 1])}
    microbatches = pack_groups(groups, BUDGET, members=[1, 4], advantages=advantages)
    assert {n for mb in microbatches for n in mb.sample_numbers.tolist()} == want
    for mb in microbatches:
        assert torch.equal(mb.advantages, mb.sample_numbers[mb.sample_ids].double())
    # A rank may hold only its own groups.
    plan = plan_rows(shapes_of(groups), BUDGET, members=[1, 4])
    held = {g: groups[g] for g in (1, 4)}
    for got, want_mb in zip(make_microbatches(plan, held, advantages=advantages), microbatches):
        assert torch.equal(got.tokens, want_mb.tokens)
        assert torch.equal(got.weights, want_mb.weights)


def test_filler_is_valid_and_trains_nothing():
    groups = random_groups(0, 1)
    plan = plan_rows(shapes_of(groups), BUDGET, pad_to_multiple=4)
    plan = PackPlan(plan.shapes, (*plan.rows, ()), plan.pad_to_multiple)
    assert plan.num_fillers == 1
    *_, filler = make_microbatches(plan, groups, pad_id=2)
    assert filler.is_filler and filler.tokens.tolist() == [2, 2, 2, 2]
    assert filler.num_loss_tokens == len(filler.target_tokens) == 0
    assert filler.old_logprobs.shape == (0,) and filler.ref_logprobs is None
    assert [len(part) for part in filler.split_by_sample(filler.weights)] == [0]


def test_split_by_sample_inverts_the_flattening():
    groups = random_groups(2, 8)
    samples, seen = flat_samples(groups), 0
    for mb in pack_groups(groups, BUDGET, min_shared=1):
        assert not mb.is_filler
        advantages = mb.split_by_sample(mb.advantages)
        positions = mb.split_by_sample(mb.positions)
        assert len(advantages) == len(mb.sample_numbers)
        for number, values, places in zip(mb.sample_numbers.tolist(), advantages, positions):
            sample = samples[number]
            dense = torch.full((len(sample.tokens),), -9.0, dtype=torch.float64)
            dense[places] = values
            want = torch.where(sample.loss_mask, sample.advantages, -9.0)
            assert torch.equal(dense[len(sample.prompt_ids) :], want)
            seen += len(values) > 0
    assert seen > 5


def test_refuses_logprobs_of_some_samples_only():
    full = make_sample([1], [2], advantages=[0.0], old_logprobs=[-1.0])
    bare = make_sample([1], [3], advantages=[0.0])
    groups = [Group("a", (full,)), Group("b", (full, bare))]
    with pytest.raises(ValueError, match="sample 1 of group 'b' has no old_logprobs, sample 0 of"):
        pack_groups(groups, 100)


def test_refuses_missing_advantages_and_wrong_sizes():
    groups = [Group("a", (make_sample([1], [2]), make_sample([1], [3])))]
    with pytest.raises(ValueError, match="carry no advantages; pass advantages="):
        pack_groups(groups, 100)
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\).* 2 samples"):
        pack_groups(groups, 100, advantages=torch.zeros(3))
    with pytest.raises(ValueError, match=r"sample_weights has shape \(1,\).* 2 samples"):
        pack_groups(groups, 100, advantages=torch.zeros(2), sample_weights=torch.ones(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": torch.tensor([], dtype=torch.int64)}, "prompt_ids must be"),
        ({"response_ids": torch.tensor([1.0, 2.0])}, "response_ids must be"),
        ({"response_ids": torch.tensor([[1, 2]])}, "response_ids must be"),
        ({"loss_mask": torch.tensor([1, 0])}, "loss_mask must be bool"),
        ({"loss_mask": torch.tensor([True])}, "loss_mask has shape"),
        ({"old_logprobs": torch.zeros(3)}, "old_logprobs has shape"),
        ({"advantages": torch.zeros(())}, "advantages has shape"),
        ({"response_ids": torch.ones(2).long().to("meta")}, "response_ids lives on meta"),
        ({"advantages": torch.ones(2, device="meta")}, "advantages lives on meta"),
        ({"reward": float("nan")}, "reward=nan must be finite"),
    ],
)
def test_sample_refuses_what_disagrees(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_sample([1], [2, 3]), **change)
