"""Every backend's windows, sinks, softcap and value sizes against written-out samples."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import (
    ATTENTION_BACKENDS,
    AttentionInputs,
    AttentionKind,
    ResidentKV,
    available_backends,
)
from megatron_pg.tree import ResidentSpans
from tests.attention.flash_rule import DenseFlashAttention
from tests.attention.test_attention import gradients, written_out_attention
from tests.utils import CPU_BACKENDS, assert_close, assert_close_to_control

NAMES = ("out", "dq", "dk", "dv", "dsink")
F64 = torch.float64


def random_tree(rng: random.Random) -> PrefixTree:
    samples = [[rng.randint(0, 2) for _ in range(rng.randint(1, 14))]]
    for _ in range(rng.randint(0, 7)):
        stem = rng.choice(samples)
        fork = rng.randint(0, len(stem))
        length = rng.randint(0 if fork else 1, 9)
        samples.append(stem[:fork] + [rng.randint(0, 2) for _ in range(length)])
    return PrefixTree.from_sequences(samples)


def random_row(rng: random.Random, is_divided: bool) -> tuple[PackedLayout, list[int]]:
    """A padded row of trees, and the tokens of the resident prefix rows that some continue."""
    trees: list[PrefixTree] = []
    tables: dict[int, list[tuple[int, int, int, int]]] = {}
    rows, offset = [0, 0], 0
    for _ in range(rng.randint(1, 3)):
        tree = random_tree(rng)
        if is_divided and rng.random() < 0.7:
            lens = np.where(tree.segment_parents < 0, tree.segment_lens - 1, 0)
            tree = cut = tree.without_prefix([rng.randint(0, n) for n in lens.tolist()])
            starts, ends = cut.segment_starts + offset, cut.segment_subtree_ends + offset
            row = rng.randrange(2)
            for root in np.nonzero(cut.resident_lens)[0].tolist():
                length = int(cut.resident_lens[root])
                span = int(starts[root]), int(ends[root]), rows[row], rows[row] + length
                tables.setdefault(row, []).append(span)
                rows[row] += length + rng.randint(0, 2)
        trees.append(tree)
        offset += tree.unique_tokens
    spans = [ResidentSpans(n, np.array(t)[:, :2], np.array(t)[:, 2:]) for n, t in tables.items()]
    return pack_trees(trees, rng.choice([1, 8]), spans), rows


def random_inputs(
    layout: PackedLayout,
    rows: list[int],
    heads: tuple[int, int],
    head_dim: int,
    kind: AttentionKind,
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], Tensor]:
    """q, k, v and a sink where the kind has one; keys and values of prefix rows; dout."""
    value_dim, tokens = kind.value_dim or head_dim, layout.total_tokens
    k, v = heads[1], heads[1]
    make = partial(torch.randn, dtype=F64)
    inputs = [2 * make(tokens, heads[0], head_dim), make(tokens, k, head_dim)]
    inputs += [make(tokens, v, value_dim)] + [make(heads[0])] * kind.has_sink
    kept = [(make(n, k, head_dim), make(n, v, value_dim)) for n in rows]
    return inputs, kept, make(tokens, heads[0], value_dim)


def ours(
    layout: PackedLayout, kind: AttentionKind, backend: str, kept: list[ResidentKV]
) -> Callable[..., Tensor]:
    return lambda q, k, v, sink=None: prefix_grouped_attention(
        q, k, v, layout, backend=backend, kind=kind, sink=sink, resident=kept
    )


def truth(
    layout: PackedLayout,
    kind: AttentionKind,
    inputs: list[Tensor],
    kept: list[tuple[Tensor, Tensor]],
    dout: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients, and those of kept keys and values, one after the other."""
    flat = [x.clone().requires_grad_() for pair in kept for x in pair]
    pairs = list(zip(flat[::2], flat[1::2]))
    want = gradients(
        lambda q, k, v, sink=None: written_out_attention(q, k, v, layout, kind, sink, pairs),
        inputs,
        dout,
    )
    return want, [torch.zeros_like(x) if x.grad is None else x.grad for x in flat]


@pytest.fixture
def flash(monkeypatch, tmp_path) -> DenseFlashAttention:
    """The kernels of both CUDA backends, written out."""
    rule = DenseFlashAttention()
    aten = torch.ops.aten
    monkeypatch.setattr(aten, "_flash_attention_forward", rule.aten_forward, raising=False)
    monkeypatch.setattr(aten, "_flash_attention_backward", rule.aten_backward, raising=False)
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = rule.package_forward
    interface._flash_attn_varlen_backward = rule.package_backward
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return rule


def random_kind(rng: random.Random, backend: str) -> tuple[AttentionKind, int]:
    """A kind that the backend computes, and a head size."""
    head_dim, value_dim = rng.choice([(8, None), (8, 8), (16, 8), (8, 24)])
    features = ATTENTION_BACKENDS[backend].features
    windows = [None, 0, 1, 2, 3, 5, 8, 13, 40]
    return AttentionKind(
        softmax_scale=rng.choice([None, 0.6]),
        window=rng.choice(windows) if "window" in features else None,
        has_sink=rng.random() < 0.5,
        softcap=rng.choice([None, 1.5]) if "softcap" in features else None,
        value_dim=value_dim,
    ), head_dim


@pytest.mark.parametrize("is_divided", [False, True], ids=["whole", "resident"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_random_forests_of_any_kind(backend: str, is_divided: bool) -> None:
    compare_random_forests(backend, is_divided)


@pytest.mark.parametrize("is_divided", [False, True], ids=["whole", "resident"])
@pytest.mark.parametrize("backend", ["flash", "flash_attn"])
def test_what_cuda_kernels_are_told_is_right(flash, monkeypatch, backend, is_divided) -> None:
    """By the rules that the kernels document; what they compute is for machines that have them."""
    monkeypatch.setattr(type(ATTENTION_BACKENDS[backend]), "refusal", lambda self, inputs: None)
    compare_random_forests(backend, is_divided)
    assert flash.num_lone > 100, "gaps between spans are queries without keys, whose lse is +inf"


@pytest.mark.parametrize("backend", ["flash", "flash_attn"])
def test_a_window_is_one_call_over_what_it_reaches(flash, monkeypatch, backend) -> None:
    monkeypatch.setattr(type(ATTENTION_BACKENDS[backend]), "refusal", lambda self, inputs: None)
    for seed in range(40):
        rng = random.Random(seed)
        layout, rows = random_row(rng, is_divided=True)
        kind = AttentionKind(window=rng.randint(0, max(layout.max_position - 1, 0)))
        inputs, kept, _ = random_inputs(layout, rows, (1, 1), 8, kind)
        before = flash.num_pairs, flash.num_calls
        ours(layout, kind, backend, [ResidentKV(*pair) for pair in kept])(*inputs)
        positions = layout.position_ids[: layout.unique_tokens]
        visible = int((positions.clamp(max=kind.window) + 1).sum())
        assert (flash.num_pairs, flash.num_calls) == (before[0] + visible, before[1] + 1)


def compare_random_forests(backend: str, is_divided: bool) -> None:
    """With written-out samples: outputs and all gradients, of whatever the backend computes."""
    seen: Counter[str] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        layout, rows = random_row(rng, is_divided)
        kind, head_dim = random_kind(rng, backend)
        heads = rng.choice([(1, 1), (4, 2), (3, 3), (4, 1)])
        inputs, kept, dout = random_inputs(layout, rows, heads, head_dim, kind)
        resident = [ResidentKV(*pair) for pair in kept]
        got = gradients(ours(layout, kind, backend, resident), inputs, dout)
        want, want_kept = truth(layout, kind, inputs, kept, dout)
        for name, g, w in zip(NAMES, got, want):
            assert_close(f"{seed} {name}", g, w, 1e-10, least_scale=1e-3)
        got_kept = [x for kv in resident for x in kv.grads()]
        for name, g, w in zip(("dk 0", "dv 0", "dk 1", "dv 1"), got_kept, want_kept):
            assert_close(f"{seed} kept {name}", g, w, 1e-10, least_scale=1e-3)
        seen.update(name for name, _ in kind.features(head_dim))
        seen["deep"] += layout.forest.depth > 2
        seen["resident"] += bool(layout.resident_spans)
        window = layout.max_position if kind.window is None else kind.window
        seen["narrow"] += window < layout.max_position
    wanted = set(ATTENTION_BACKENDS[backend].features) | {"deep"}
    wanted |= {"resident"} if is_divided else set()
    wanted |= {"narrow"} if "window" in ATTENTION_BACKENDS[backend].features else set()
    assert all(seen[name] > 5 for name in wanted), seen


KINDS_16_BIT = {
    "sink": AttentionKind(has_sink=True),
    "smaller values": AttentionKind(value_dim=32),
    "window": AttentionKind(window=11),
    "all": AttentionKind(value_dim=80, has_sink=True, window=30),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS_16_BIT)
def test_16_bit_error_is_at_most_twice_an_ordinary_attentions(name: str, dtype) -> None:
    compare_errors("cpu", "cpu", KINDS_16_BIT[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*KINDS_16_BIT, "softcap"])
@pytest.mark.parametrize("backend", ["flash", "flash_attn"])
def test_cuda_kernels_error_is_at_most_twice_an_ordinary_attentions(backend, name) -> None:
    kind = {**KINDS_16_BIT, "softcap": AttentionKind(softcap=4.0, window=30)}[name]
    inputs = AttentionInputs(torch.device("cuda"), torch.bfloat16, 64, 4, 2, kind)
    if backend not in available_backends(inputs):
        pytest.skip(f"{backend} does not take it: {ATTENTION_BACKENDS[backend].refusal(inputs)}")
    compare_errors(backend, "cuda", kind, torch.bfloat16)


def compare_errors(backend: str, device: str, kind: AttentionKind, dtype: torch.dtype) -> None:
    """The control: the same dtype, written out, every operator's result rounded to it."""
    stem = list(range(40))
    samples = [stem + [100 + i] * 9 for i in range(3)]
    trees = [PrefixTree.from_sequences(samples), PrefixTree.from_group(33, [17] * 4)]
    layout = pack_trees(trees, 8)
    inputs, _, dout = random_inputs(layout, [], (4, 2), 64, kind)
    inputs, dout = [x.to(device, dtype) for x in inputs], dout.to(device, dtype)
    got = gradients(ours(layout, kind, backend, []), inputs, dout)

    def written_out(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
        return written_out_attention(q, k, v, layout, kind, sink)

    control = gradients(written_out, inputs, dout)
    exact = gradients(written_out, [x.double() for x in inputs], dout.double())
    for name, g, c, e in zip(NAMES, got, control, exact):
        assert g.dtype == dtype
        assert_close_to_control(name, g, c, e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_siblings_are_isolated_bit_for_bit(backend: str, dtype) -> None:
    """Under a window that reaches from the responses into the prompt."""
    layout = pack_trees([PrefixTree.from_group(20, [9, 9, 9]), PrefixTree.from_group(7, [5, 5])])
    kind = AttentionKind(window=12, has_sink=True, value_dim=24)
    inputs, _, dout = random_inputs(layout, [], (4, 2), 16, kind)
    inputs, dout = [x.to(dtype) for x in inputs], dout.to(dtype)
    changed = layout.segment_ids == 2
    before = gradients(ours(layout, kind, backend, []), inputs, dout)
    other = [torch.where(changed[:, None, None], torch.randn_like(x), x) for x in inputs[:3]]
    after = gradients(ours(layout, kind, backend, []), [*other, inputs[3]], dout)
    for name, b, a in zip(NAMES[:4], before, after):
        siblings = (layout.multiplicity == 1) & ~changed
        assert torch.equal(b[siblings], a[siblings]), f"{name} of a sibling changed"
        assert not torch.equal(b[changed], a[changed]), f"{name} of the changed response did not"
    # The prompt's last tokens are seen by the changed response, its first ones are beyond reach.
    for name, b, a in zip(("dk", "dv"), before[2:4], after[2:4]):
        assert torch.equal(b[:8], a[:8]), name
        assert not torch.equal(b[8:20], a[8:20]), name
