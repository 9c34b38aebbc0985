"""The packed row against its written-out samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.tree import dense_mask
from tests.strategies import forests


@settings(max_examples=200)
@given(forests())
def test_row_equals_its_samples(forest: tuple[PackedLayout, list[list[int]]]) -> None:
    layout, samples = forest
    tokens = layout.pack_tokens(samples, pad_id=77)
    multiplicity = torch.zeros(layout.total_tokens, dtype=torch.int64)
    for i, sample in enumerate(samples):
        index = layout.sample_indices(i)
        assert tokens[index].tolist() == sample
        assert layout.position_ids[index].tolist() == list(range(len(sample)))
        multiplicity[index] += 1
        # Every token's predictor is the token before it on the sample's own path.
        assert layout.predictor_of[index[0]] == -1
        assert torch.equal(layout.predictor_of[index[1:]], index[:-1])
        targets = torch.searchsorted(layout.target_ids, index[1:])
        assert torch.equal(layout.target_ids[targets], index[1:])
        assert torch.equal(layout.predictor_ids[targets], index[:-1])
    assert torch.equal(layout.multiplicity, multiplicity)
    assert layout.num_samples == len(samples)
    assert layout.logical_tokens == int(multiplicity.sum())
    assert layout.reuse_ratio == layout.logical_tokens / layout.unique_tokens
    padding = slice(layout.unique_tokens, None)
    assert (tokens[padding] == 77).all() and (layout.segment_ids[padding] == -1).all()
    assert (layout.predictor_of[padding] == -1).all()


@settings(max_examples=200)
@given(forests())
def test_mask_is_the_union_of_the_samples(forest: tuple[PackedLayout, list[list[int]]]) -> None:
    layout, samples = forest
    visible = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.bool)
    for i, sample in enumerate(samples):
        index = layout.sample_indices(i)
        causal = torch.ones(len(sample), len(sample), dtype=torch.bool).tril()
        visible[index[:, None], index[None, :]] |= causal
    padding = torch.arange(layout.unique_tokens, layout.total_tokens)
    visible[padding, padding] = True
    assert torch.equal(dense_mask(layout), visible)


@settings(max_examples=100)
@given(forests())
def test_expand_and_reduce_are_transposes(forest: tuple[PackedLayout, list[list[int]]]) -> None:
    layout, samples = forest
    packed = torch.randn(layout.total_tokens, 2, dtype=torch.float64, requires_grad=True)
    logical = layout.expand(packed)
    parts = torch.split(logical, layout.sample_lens.tolist())
    for i, part in enumerate(parts):
        assert torch.equal(part, packed[layout.sample_indices(i)])
    cotangent = torch.randn_like(logical)
    logical.backward(cotangent)
    torch.testing.assert_close(packed.grad, layout.reduce(cotangent))
    assert (layout.reduce(cotangent)[layout.unique_tokens :] == 0).all()
    assert len(parts) == len(samples)


def test_last_shared_token_predicts_one_token_per_child() -> None:
    layout = pack_trees([PrefixTree.from_group(3, [2, 1, 2])])
    predicted = layout.target_ids[layout.predictor_ids == 2]
    assert predicted.tolist() == [3, 5, 6]
    assert len(layout.target_ids) == layout.unique_tokens - 1


def test_prompts_that_hold_the_pad_token() -> None:
    sequences = [[0, 0, 5], [0, 0, 0, 7]]
    layout = pack_trees([PrefixTree.from_group(2, [1, 2])], pad_to_multiple=4)
    tokens = layout.pack_tokens(sequences, pad_id=0)
    assert (layout.total_tokens, layout.unique_tokens) == (8, 5)
    assert [tokens[layout.sample_indices(i)].tolist() for i in range(2)] == sequences


def test_groups_with_equal_prompts_are_never_merged() -> None:
    group = PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4]])
    layout = pack_trees([group, group])
    assert layout.unique_tokens == 2 * group.unique_tokens
    visible = dense_mask(layout)
    half = group.unique_tokens
    assert not visible[half:, :half].any() and not visible[:half, half:].any()
    assert layout.token_ids.tolist() == [1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack_trees([]), "trees is empty"),
        (lambda: pack_trees([PrefixTree.from_group(1, [1])], 0), "pad_to_multiple=0"),
        (lambda: layout().pack_tokens([[1, 2, 3]]), "1 sequences for 2 samples"),
        (lambda: layout().pack_tokens([[1, 2, 3], [1, 2]]), r"sequences\[1\] has shape \(2,\)"),
        (
            lambda: layout().pack_tokens([[1, 2, 3], [1, 9, 4, 5]]),
            "differs at position 1 from another sample",
        ),
        (lambda: layout().expand(torch.zeros(4)), "first dim must be 5"),
        (lambda: layout().reduce(torch.zeros(4)), "first dim must be 7"),
        (lambda: layout().token_ids, "hold lengths only"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def layout() -> PackedLayout:
    return pack_trees([PrefixTree.from_group(2, [1, 2])])


def test_unknown_sample() -> None:
    for call in (lambda: layout().sample_indices(2), lambda: layout().sample_indices(-1)):
        with pytest.raises(IndexError, match="row with 2 samples"):
            call()


def test_rows_with_and_without_tokens_mix() -> None:
    mixed = pack_trees([PrefixTree.from_group(1, [1]), PrefixTree.from_sequences([[1, 2]])])
    assert mixed.forest.token_ids is None and mixed.num_trees == 2
    assert mixed.tree_sample_offsets.tolist() == [0, 1, 2]
    assert mixed.tree_segment_offsets.tolist() == [0, 2, 3]
