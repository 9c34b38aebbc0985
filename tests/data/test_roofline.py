"""Predicted seconds against counts done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_pg.data import (
    CARDS,
    FORWARD_BACKWARD,
    AttentionSizes,
    Card,
    CostModel,
    FlopWeights,
    GroupShape,
    PackPlan,
    RowPart,
    StepWork,
    merge_bytes,
    predict_step,
    product_flops_on,
    seconds_on,
)
from megatron_pg.tree import PrefixTree

HEADS = AttentionSizes(num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128)
COST = CostModel(per_token=100.0, per_attention_pair=3.0, per_loss_token=50.0)
CARD = Card(
    product_flops=1e3,
    attention_flops=1e2,
    memory_bytes=1e4,
    link_bytes=1e5,
    sold_gb=80,
    capacity_bytes=1,
)
SIZES = dict(cost=COST, hidden_size=8, vocab_size=20, num_layers=4, optimizer_parameters=1000)


def group(tree: PrefixTree, loss_lens: list[int]) -> GroupShape:
    prompt = int(tree.segment_lens[0])
    return GroupShape("g", tree, np.array(loss_lens), np.full(len(loss_lens), prompt))


def test_merges_of_a_row_of_a_training() -> None:
    """As the kernels' own count has it: 4096 tokens that attend twice, 2048 that are read twice."""
    tree = PrefixTree.from_group(2048, [512] * 8)
    rows = 3 * 2 * 128 * (2 * 4096 * 32 + 2 * 2048 * 8)
    assert merge_bytes(tree, HEADS) == rows + 3 * 4 * 4096 * 32 <= 230e6


def test_merges_of_a_deep_tree_and_of_what_is_resident() -> None:
    one = AttentionSizes(num_heads=1, num_kv_heads=1, head_dim=3, value_dim=5)
    # Segments of 9, 4, 3, 2 and 1 tokens at depths 0, 1, 2, 2 and 1.
    trunk = [1] * 9 + [2] * 4
    tree = PrefixTree.from_sequences([trunk + [3] * 3, trunk + [5] * 2, [1] * 9 + [7]])
    queries, keys = (4 + 1) * 3 + (3 + 2) * 4, 3 * (9 + 4)
    assert merge_bytes(tree, one) == 8 * 2 * (queries + keys) + 4 * queries
    # Eight tokens of the first are resident: what is left of it attends to them, too.
    rest = tree.without_prefix([8, 0, 0, 0, 0])
    queries, keys = 1 * 3 + (4 + 1) * 4 + (3 + 2) * 5, 3 * (1 + 4)
    assert merge_bytes(rest, one) == 8 * 2 * (queries + keys) + 4 * queries
    assert merge_bytes(PrefixTree.from_sequences([[1, 2]]), one) == 0


def test_work_of_rows() -> None:
    tree = PrefixTree.from_group(4, [2, 3])
    shapes = (group(tree, [2, 3]),)
    plan = PackPlan(shapes=shapes, rows=((RowPart(0, (0, 1)),), ()), pad_to_multiple=1)
    work = StepWork.of_waves([plan], COST, HEADS)
    # Pairs: 10 in the prompt, 4 * 2 + 3 and 4 * 3 + 6 of the responses.
    assert (work.tokens, work.attention_flops, work.predictions) == (9, 3.0 * 39, 5)
    assert (work.num_rows, work.num_waves) == (2, 1)
    assert work.merge_bytes == merge_bytes(tree, HEADS)
    assert StepWork.of_waves([plan], COST, HEADS, lambda part: 4).predictions == 4
    resident = PackPlan(
        shapes=shapes,
        rows=((RowPart(0, (0,), is_resident=True),), (RowPart(0, (1,), is_resident=True),)),
        pad_to_multiple=1,
        prefix_rows=((0,),),
    )
    work = StepWork.of_waves([resident, resident], COST, HEADS)
    # Three tokens stay, the last one stands in both rows: pairs 6, 4 + 11 and 4 + 18.
    assert (work.tokens, work.num_rows, work.num_waves) == (2 * (3 + 3 + 4), 6, 2)
    assert work.attention_flops == 2 * 3.0 * (6 + 15 + 22)


WORK = StepWork(
    tokens=30,
    attention_flops=600.0,
    predictions=10,
    merge_bytes=500,
    num_rows=3,
    num_waves=1,
)


def test_seconds_on_one_rank() -> None:
    time = predict_step(WORK, CARD, **SIZES, passes=FORWARD_BACKWARD)
    assert time.products == pytest.approx(3 * 100 * 30 / 1e3)
    assert time.attention == pytest.approx(3.5 * 600 / 1e2)
    assert time.merges == pytest.approx(500 * 4 / 1e4)
    # Logits of two bytes: read by the statistics, read and written by the gradient.
    assert time.head == pytest.approx(4 * 50 * 10 / 1e3 + 3 * 10 * 20 * 2 / 1e4)
    assert time.optimizer == pytest.approx(1000 * 38 / 1e4)
    assert time.exchange == 0 == time.idle
    parts = time.products + time.attention + time.merges + time.head + time.optimizer
    assert time.total == pytest.approx(parts)
    assert str(time) == "36.1 s (attention 21, products 9, optimizer 3.8, head 2.1)"
    again = predict_step(WORK, CARD, **SIZES, passes=FlopWeights(4, 4.5, 5), num_updates=2)
    assert again.products == pytest.approx(time.products * 4 / 3)
    assert again.optimizer == pytest.approx(2 * time.optimizer)


def test_a_model_in_seconds_says_what_a_step_takes() -> None:
    cost = replace(COST, per_window_pair=((1, 2.0),))
    seconds = seconds_on(CARD, cost, FORWARD_BACKWARD)
    tree = PrefixTree.from_group(4, [2, 3])
    work = replace(WORK, tokens=9, attention_flops=cost.attention(tree), predictions=5)
    time = predict_step(work, CARD, **SIZES | dict(vocab_size=0), passes=FORWARD_BACKWARD)
    said = time.products + time.attention + time.head
    assert seconds.estimate(tree, 5) == pytest.approx(said)


def test_a_model_in_product_flops_balances_what_takes_time() -> None:
    cost = replace(COST, per_window_pair=((1, 2.0),))
    flops, seconds = product_flops_on(CARD, cost), seconds_on(CARD, cost, FORWARD_BACKWARD)
    # Attention reaches a tenth of what products reach; its backward pass is 2.5 forward ones.
    assert flops.per_token == pytest.approx(cost.per_token)
    assert flops.per_attention_pair == pytest.approx(cost.per_attention_pair * 10 * 3.5 / 3)
    for tree in (PrefixTree.from_group(4, [2, 3]), PrefixTree.from_group(90, [9])):
        ratio = flops.estimate(tree, 5) / seconds.estimate(tree, 5)
        assert ratio == pytest.approx(CARD.product_flops / 3)


def test_ranks_divide_and_wait() -> None:
    whole = predict_step(WORK, CARD, **SIZES, passes=FORWARD_BACKWARD)
    two = predict_step(
        WORK, CARD, **SIZES, passes=FORWARD_BACKWARD, tp_size=2, sequence_parallel=True
    )
    for name in ("products", "attention", "merges", "head"):
        assert getattr(two, name) == pytest.approx(getattr(whole, name) / 2)
    # In each layer ten exchanges of half of 30 rows of 8 values of two bytes.
    assert two.exchange == pytest.approx(4 * 10 * 30 * 8 * 2 / 2 / 1e5)
    piped = predict_step(WORK, CARD, **SIZES, passes=FORWARD_BACKWARD, pp_size=2)
    layers = (whole.products + whole.attention + whole.merges) / 2
    assert piped.products + piped.attention + piped.merges == pytest.approx(layers)
    # The head is the last stage's alone; a third of the stage's work fills and drains it.
    assert piped.head == whole.head and piped.idle == pytest.approx(layers / 3)
    waves = replace(WORK, num_waves=2)
    assert predict_step(
        waves, CARD, **SIZES, passes=FORWARD_BACKWARD, pp_size=2, vpp_size=2
    ).idle == pytest.approx(layers / 3)


def test_ranks_that_divide_rows_exchange_tokens_for_heads() -> None:
    whole = predict_step(WORK, CARD, **SIZES, passes=FORWARD_BACKWARD)
    sizes: Any = dict(tp_size=2, sequence_parallel=True, cp_size=2, exchanged_values=12.0)
    four = predict_step(WORK, CARD, **SIZES, **sizes, passes=FORWARD_BACKWARD)
    for name in ("products", "attention", "merges", "head"):
        assert getattr(four, name) == pytest.approx(getattr(whole, name) / 4)
    # Ten exchanges of half of 15 rows between layers' halves, 12 values a token both ways.
    sent = 10 * 15 * 8 / 2 + 2 * 12 * 30
    assert four.exchange == pytest.approx(4 * sent * 2 / 1e5)
    assert four.optimizer == whole.optimizer


def test_cards_differ_as_they_do() -> None:
    assert CARDS.keys() == {"h100", "h200", "a100"}
    seconds = {
        name: predict_step(WORK, card, **SIZES, passes=FORWARD_BACKWARD).total
        for name, card in CARDS.items()
    }
    assert seconds["h200"] < seconds["h100"] < seconds["a100"] < 5 * seconds["h100"]
    # What is sold in 10^9 bytes and what PyTorch finds differ by less than a tenth.
    assert all(0.9 < c.capacity_bytes / c.sold_gb / 1e9 < 1.1 for c in CARDS.values())
