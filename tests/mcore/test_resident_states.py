"""Prompts whose states stay, in one layer: against the same groups in one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.linear import continued, of_layout
from megatron_pg.mcore import PrefixGroupedSeqParams, PrefixKV
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL
from megatron_pg.tree import ResidentSpans
from tests.linear.rows import relative
from tests.mcore import harness
from tests.mcore.linear_rules import in_fp64
from tests.mcore.test_linear_attention import make_layers
from tests.mcore.test_mamba import make_mixer

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("one_rank")]

# Tokens of a prompt that stay, the prefix row, and responses in each of three rows. One is longer
# than a chunk, one shorter than what a convolution sees; the last begins anew.
GROUPS: tuple[tuple[int, int, tuple[tuple[int, ...], ...]], ...] = (
    (5, 0, ((3, 1), (2,), (7, 4))),
    (70, 0, ((66,), (1, 5), (2,))),
    (1, 1, ((4, 2), (), (1, 1))),
    (0, -1, ((3,), (2, 2), ())),
)
LAYERS: dict[str, Callable[[torch.dtype], Any]] = {
    "gated_delta_net": lambda dtype: make_layers(dtype)[1],
    "mamba": make_mixer,
}
if not HAS_HYBRID_MODEL:
    del LAYERS["mamba"]


def prefix_layouts() -> list[PackedLayout]:
    of_rows = [[n for n, at, _ in GROUPS if at == row] for row in (0, 1)]
    return [pack_trees([PrefixTree.from_sequences([[0] * n]) for n in lens]) for lens in of_rows]


def suffix_layout(number: int) -> PackedLayout:
    """Responses behind the last token of their prompt, which stands with them."""
    trees, spans, offset = [], {}, 0
    starts = {0: 0, 1: 0}
    for resident, at, rows in GROUPS:
        lens = rows[number]
        begin = starts.get(at, 0)
        starts[at] = begin + resident
        if not lens:
            continue
        tree = PrefixTree.from_group(resident + 1, lens)
        if resident:
            tree = tree.without_prefix([resident] + [0] * len(lens))
            span = (offset, offset + tree.unique_tokens, begin, begin + resident)
            spans.setdefault(at, []).append(span)
        trees.append(tree)
        offset += tree.unique_tokens
    tables = {row: np.array(table) for row, table in spans.items()}
    return pack_trees(
        trees, 4, [ResidentSpans(row, t[:, :2], t[:, 2:]) for row, t in tables.items()]
    )


def whole_rows() -> tuple[PackedLayout, list[list[int]], list[list[int]]]:
    """All groups in one row; of prefix rows and of suffix rows, every token's place in it."""
    lens = [[n for row in rows for n in row] for _, _, rows in GROUPS]
    layout = pack_trees([PrefixTree.from_group(g[0] + 1, n) for g, n in zip(GROUPS, lens)])
    prefixes: list[list[int]] = [[], []]
    suffixes: list[list[int]] = [[], [], []]
    at = 0
    for resident, row, rows in GROUPS:
        if resident:
            prefixes[row] += range(at, at + resident)
        last, at = at + resident, at + resident + 1
        for number, responses in enumerate(rows):
            if responses:
                suffixes[number] += [last, *range(at, at + sum(responses))]
            at += sum(responses)
    return layout, prefixes, suffixes


def call(layer: Any, x: Tensor, layout: PackedLayout, **resident: Any) -> Tensor:
    params = PrefixGroupedSeqParams.from_layout(layout, **resident)
    padded = torch.nn.functional.pad(x, (0, 0, 0, layout.total_tokens - len(x)))
    out: Tensor = layer(padded[:, None], attention_mask=None, packed_seq_params=params)[0]
    return out[: len(x), 0]


def gradients(layer: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def make_layer(kind: str, dtype: torch.dtype) -> Any:
    """A layer that is called as attention is."""
    layer = LAYERS[kind](dtype)
    if kind == "mamba":
        forward = layer.forward
        layer.forward = lambda x, attention_mask, **kwargs: forward(x, **kwargs)
    return layer


def run(kind: str, dtype: torch.dtype) -> tuple[dict[str, float], Sequence[PrefixKV], list[int]]:
    """Worst relative errors, what stays, and its bytes before gradients came."""
    layer = make_layer(kind, dtype)
    layout, prefixes, suffixes = whole_rows()
    gen = torch.Generator().manual_seed(0)
    x, told = (
        torch.randn(layout.total_tokens, 32, generator=gen, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    leaf = x.clone().requires_grad_()
    out = call(layer, leaf, layout)
    (out * told).sum().backward()
    want = {"output": out.detach(), "input": leaf.grad, **gradients(layer)}

    layer.zero_grad()
    leaf, got_out = x.clone().requires_grad_(), torch.zeros_like(out)
    kept = [PrefixKV() for _ in prefixes]
    graphs = [
        call(layer, leaf[tokens], row, prefix_kv=kv)
        for tokens, row, kv in zip(prefixes, prefix_layouts(), kept)
    ]
    num_bytes = [kv.num_bytes for kv in kept]
    # The last tokens of prompts stand in each row, and are told once.
    share = torch.zeros(layout.total_tokens, dtype=dtype)
    for tokens in (*prefixes, *suffixes):
        share[tokens] += 1
    for number, tokens in enumerate(suffixes):
        out = call(layer, leaf[tokens], suffix_layout(number), resident=kept)
        (out * (told / share[:, None])[tokens]).sum().backward()
        got_out[tokens] = out.detach()
    for tokens, out in zip(prefixes, graphs):
        (out * told[tokens]).sum().backward()
        got_out[tokens] = out.detach()
    got = {"output": got_out, "input": leaf.grad, **gradients(layer)}
    return {name: relative(got[name], want[name]) for name in want}, kept, num_bytes


@pytest.mark.parametrize("kind", LAYERS)
def test_states_that_stay_equal_one_row(kind: str) -> None:
    with in_fp64():
        errors, _, _ = run(kind, torch.float64)
    assert len(errors) > 6
    harness.assert_within(errors, 1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_states_inside_a_chain_that_stays(kind: str) -> None:
    """An agent's first two turns stay; rows go on after each, so that no turn is joined to it."""
    prefix_row = pack_trees([PrefixTree(np.array([3, 66]), np.array([-1, 0]), np.array([0, 1]))])
    whole = pack_trees([PrefixTree(np.array([3, 66, 5, 4]), np.array([-1, 0, 1, 0]), np.arange(4))])
    rows = []
    for resident, own in ((69, 5), (3, 4)):
        tree = PrefixTree.from_sequences([[0] * (resident + own)]).without_prefix([resident])
        spans = ResidentSpans(0, np.array([[0, own]]), np.array([[0, resident]]))
        rows.append(pack_trees([tree], resident_spans=[spans]))
    with in_fp64():
        layer = make_layer(kind, torch.float64)
        gen = torch.Generator().manual_seed(0)
        x, told = (torch.randn(78, 32, generator=gen, dtype=torch.float64) for _ in range(2))
        leaf = x.clone().requires_grad_()
        out = call(layer, leaf, whole)
        (out * told).sum().backward()
        want = {"output": out.detach(), "input": leaf.grad, **gradients(layer)}

        layer.zero_grad()
        leaf, kept = x.clone().requires_grad_(), PrefixKV()
        first = call(layer, leaf[:69], prefix_row, prefix_kv=kept)
        outs = []
        for row, tokens in zip(rows, (slice(69, 74), slice(74, 78))):
            out = call(layer, leaf[tokens], row, resident=[kept])
            (out * told[tokens]).sum().backward()
            outs.append(out.detach())
        (first * told[:69]).sum().backward()
        outs.insert(0, first.detach())
        got = {"output": torch.cat(outs), "input": leaf.grad, **gradients(layer)}
    assert kept.layout is not None and kept.layout.forest.depth == 1
    harness.assert_within({name: relative(got[name], want[name]) for name in want}, 1e-11)


def test_bytes_that_stay_do_not_grow_with_the_prompt() -> None:
    """Of every prompt a state and two inputs of the convolution, and as much for gradients."""
    _, kept, before = run("gated_delta_net", torch.float32)
    # 4 heads of 6 x 5, and 2 inputs of 2 x 12 + 20 channels, 4 bytes each.
    of_prompt = (4 * 6 * 5 + 2 * (2 * 12 + 20)) * 4
    assert before == [2 * of_prompt, of_prompt]
    assert [kv.num_bytes for kv in kept] == [4 * of_prompt, 2 * of_prompt]


def test_gradients_stay_in_fp32() -> None:
    _, kept, _ = run("gated_delta_net", torch.bfloat16)
    held = [rows for kv in kept for rows in kv.states.values()]
    assert {rows.value.dtype for rows in held} == {torch.float32, torch.bfloat16}
    assert {rows.grad.dtype for rows in held} == {torch.float32}


def test_a_row_that_comes_too_early_is_an_error() -> None:
    _, layer = make_layers(torch.float32)
    layout = suffix_layout(0)
    x = torch.zeros(layout.total_tokens, 32)
    with pytest.raises(RuntimeError, match="not been encoded"):
        call(layer, x, layout, resident=[PrefixKV(), PrefixKV()])


def test_a_prefix_that_ends_inside_a_segment_is_refused() -> None:
    (first, second), layout = prefix_layouts(), suffix_layout(0)
    forks = of_layout(layout, 3)
    found = continued(layout, forks, [first, second])
    assert [len(of.roots) for of in found] == [2, 1]
    inside = pack_trees([PrefixTree.from_sequences([[0] * 80])])
    with pytest.raises(ValueError, match="ends at token 5 of prefix row 0, inside a segment"):
        continued(layout, forks, [inside, second])
