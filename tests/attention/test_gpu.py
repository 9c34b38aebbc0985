"""Every backend of a GPU against written-out attention in fp64, at sizes of several tiles.

Kernels work in tiles of 64 or 128: rows here have segments of several tiles, of one token and of
lengths that no tile divides, gaps between the spans of a pass, grouped heads and prefixes that
stay. ``-k small`` are the cases for a memory checker; on the CPU they prove the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.attention import (
    ATTENTION_BACKENDS,
    AttentionInputs,
    AttentionKind,
    ResidentKV,
    available_backends,
)
from megatron_pg.tree import ResidentSpans
from tests.attention.test_attention import gradients
from tests.attention.test_kinds_in_backends import NAMES, ours, random_inputs, truth

# Of bf16: rounding of inputs' products and of what is stored stays below it, a key that is seen
# or missed wrongly by one of 700 does not.
BOUND = 0.015
GPU_BACKENDS = [name for name, b in ATTENTION_BACKENDS.items() if b.device_type == "cuda"]


@dataclass(frozen=True)
class Row:
    """A packed row and the tokens of the prefix rows that it continues."""

    layout: PackedLayout
    resident: tuple[int, ...] = ()


def groups(prefix: int, suffix: int) -> Row:
    """Three prompts: the passes over the responses have gaps between their spans."""
    trees = [
        PrefixTree.from_group(prefix, [suffix, suffix, suffix // 2 + 1]),
        PrefixTree.from_group(prefix // 5, [suffix, 64, 1]),
        PrefixTree.from_group(1, [prefix]),
    ]
    return Row(pack_trees(trees, pad_to_multiple=128))


def deep(prefix: int, suffix: int) -> Row:
    """Three levels: rows of the last one are merged from three passes."""
    stem = list(range(prefix))
    samples = []
    for branch in range(3):
        turn = [prefix + branch] * (suffix // 2 + branch)
        samples += [stem + turn + [prefix + 10 + n] * (suffix - 30 * n) for n in range(2)]
    trees = [PrefixTree.from_sequences(samples), PrefixTree.from_group(130, [suffix, 3])]
    return Row(pack_trees(trees))


def resident(prefix: int, suffix: int) -> Row:
    """Groups that continue two prefix rows, with a whole group and unseen keys between them."""

    def cut(length: int, *lens: int) -> PrefixTree:
        tree = PrefixTree.from_group(length, list(lens))
        return tree.without_prefix([length - 1] + [0] * len(lens))

    second = prefix // 3
    trees = [
        cut(prefix, suffix, suffix // 2),
        PrefixTree.from_group(second, [suffix, 5]),
        cut(second, suffix),
        cut(prefix, suffix, 7),
    ]
    ends = np.cumsum([tree.unique_tokens for tree in trees]).tolist()
    q = [(0, ends[0]), (ends[1], ends[2]), (ends[2], ends[3])]
    # Of the first prefix row 40 tokens between its two prefixes are another group's.
    kv = [(0, prefix - 1), (prefix + 39, prefix + 38 + second), (0, prefix - 1)]
    spans = [
        ResidentSpans(0, np.array(q[:2]), np.array(kv[:2])),
        ResidentSpans(1, np.array(q[2:]), np.array(kv[2:])),
    ]
    return Row(pack_trees(trees, 1, spans), (prefix + 38 + second, prefix - 1))


ROWS: dict[str, Callable[[int, int], Row]] = {"groups": groups, "deep": deep, "resident": resident}
HEADS = {f"{q}-{kv}x{dim}": (q, kv, dim) for q, kv in ((32, 8), (8, 8)) for dim in (128, 64)}
KINDS = {
    "plain": AttentionKind(),
    "sink": AttentionKind(has_sink=True),
    "window": AttentionKind(window=200),
    "window_sink": AttentionKind(window=330, has_sink=True, softmax_scale=0.2),
}


def worst_segment(layout: PackedLayout, got: Tensor, want: Tensor) -> float:
    """Largest error of a segment relative to its size: one response's is not lost in a row's.

    A segment whose values cancel is measured by half the size that segments have on average.
    """
    got, want = got.double(), want.double()
    ends = [*layout.forest.segment_starts.tolist(), layout.unique_tokens]
    worst, average = 0.0, float(want[: ends[-1]].square().mean().sqrt())
    for begin, end in zip(ends, ends[1:]):
        size = float(want[begin:end].square().mean().sqrt())
        error = float((got[begin:end] - want[begin:end]).square().mean().sqrt())
        assert np.isfinite(error), f"tokens {begin} to {end}"
        worst = max(worst, error / max(size, average / 2))
    return worst


def errors(
    row: Row, heads: tuple[int, int, int], kind: AttentionKind, backend: str, device: str
) -> dict[str, float]:
    """Of the output and of every gradient, those of kept keys and values included."""
    layout, dtype = row.layout, torch.bfloat16
    inputs, kept, dout = random_inputs(layout, list(row.resident), heads[:2], heads[2], kind)
    inputs = [x.to(device, dtype) for x in inputs]
    kept = [(k.to(device, dtype), v.to(device, dtype)) for k, v in kept]
    dout = dout.to(device, dtype)
    residents = [ResidentKV(*pair) for pair in kept]
    got = gradients(ours(layout, kind, backend, residents), inputs, dout)
    want, want_kept = truth(
        layout,
        kind,
        [x.double() for x in inputs],
        [(k.double(), v.double()) for k, v in kept],
        dout.double(),
    )
    found = {name: worst_segment(layout, g, w) for name, g, w in zip(NAMES[:4], got[:4], want[:4])}
    flat = [x for kv in residents for x in kv.grads()]
    others = list(zip(("dk 0", "dv 0", "dk 1", "dv 1"), flat, want_kept))
    others += list(zip(NAMES[4:], got[4:], want[4:]))
    for name, g, w in others:
        found[name] = float((g.double() - w).norm() / w.norm())
    padding = got[0][layout.unique_tokens :], inputs[2][layout.unique_tokens :]
    repeats = heads[0] // heads[1]
    assert torch.equal(padding[0], padding[1].repeat_interleave(repeats, 1))
    return found


def compare(
    row: Row,
    heads: tuple[int, int, int],
    kind: AttentionKind,
    backend: str,
    device: str,
    record_property: Callable[[str, object], None],
) -> None:
    inputs = AttentionInputs(torch.device(device), torch.bfloat16, heads[2], *heads[:2], kind)
    if backend not in available_backends(inputs):
        pytest.skip(f"{backend} {ATTENTION_BACKENDS[backend].refusal(inputs)}")
    found = errors(row, heads, kind, backend, device)
    record_property("backend", backend)
    record_property("error", max(found.values()))
    assert {"out", "dq", "dk", "dv"} <= found.keys()
    assert ("dsink" in found) == kind.has_sink and ("dk 1" in found) == bool(row.resident)
    assert max(found.values()) < BOUND, found


WHOLE = [
    (rows, kind)
    for rows in ROWS
    for kind in KINDS
    if rows == "groups" or kind in ("plain", "window_sink")
]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "kind"), WHOLE, ids=["-".join(pair) for pair in WHOLE])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_backends_equal_fp64(backend, heads, rows, kind, record_property) -> None:
    """A prompt of 700 tokens and responses of 300."""
    row = ROWS[rows](700, 300)
    compare(row, HEADS[heads], KINDS[kind], backend, "cuda", record_property)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "kind"), WHOLE, ids=["-".join(pair) for pair in WHOLE])
def test_the_reference_equals_fp64_on_a_gpu(rows, kind, record_property) -> None:
    row = ROWS[rows](700, 300)
    compare(row, (8, 8, 64), KINDS[kind], "reference", "cuda", record_property)


SMALL = ["cpu", *(pytest.param(name, marks=[pytest.mark.gpu]) for name in GPU_BACKENDS)]


@pytest.mark.parametrize("kind", ["plain", "window_sink"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", SMALL)
def test_small_rows_equal_fp64(backend, rows, kind, record_property) -> None:
    row = ROWS[rows](200, 140)
    device = ATTENTION_BACKENDS[backend].device_type
    window = AttentionKind(window=90, has_sink=True)
    chosen = window if kind == "window_sink" else KINDS[kind]
    compare(row, (4, 2, 64), chosen, backend, device, record_property)
    spans = [span for s in row.layout.resident_spans for span in s.q_spans.tolist()]
    assert row.layout.forest.depth == (2 if rows == "deep" else 1)
    assert len(spans) == (3 if rows == "resident" else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "window_sink"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_another_response_changes_no_bit(backend, kind) -> None:
    """Neither by the order of sums nor by how a kernel divides its work."""
    inputs_of = AttentionInputs(torch.device("cuda"), torch.bfloat16, 128, 32, 8, KINDS[kind])
    if backend not in available_backends(inputs_of):
        pytest.skip(f"{backend} {ATTENTION_BACKENDS[backend].refusal(inputs_of)}")
    layout = groups(700, 300).layout
    inputs, _, dout = random_inputs(layout, [], (32, 8), 128, KINDS[kind])
    inputs, dout = [x.to("cuda", torch.bfloat16) for x in inputs], dout.to("cuda", torch.bfloat16)
    changed = (layout.segment_ids == 2).cuda()
    others = [torch.where(changed[:, None, None], torch.randn_like(x), x) for x in inputs[:3]]
    run = ours(layout, KINDS[kind], backend, [])
    before = gradients(run, inputs, dout)
    again = gradients(run, inputs, dout)
    after = gradients(run, [*others, *inputs[3:]], dout)
    siblings = ((layout.multiplicity == 1).cuda() & ~changed).nonzero()[:, 0]
    assert int(changed.sum()) == 300 and len(siblings) > 1000
    for name, b, c, a in zip(NAMES[:4], before, again, after):
        assert torch.equal(b, c), f"{name} of the same inputs"
        assert torch.equal(b[siblings], a[siblings]), f"{name} of a sibling changed"
        assert not torch.equal(b[changed], a[changed]), f"{name} of the changed one did not"
