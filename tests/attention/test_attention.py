"""Prefix-grouped attention against dense attention of every written-out sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_pg import (
    PackedLayout,
    PrefixTree,
    available_backends,
    pack_trees,
    prefix_grouped_attention,
)
from megatron_pg.attention import (
    AttentionInputs,
    AttentionKind,
    merge_implementation,
    select_backend,
)
from tests.strategies import forests
from tests.utils import CPU_BACKENDS, assert_close, assert_close_to_control

GPU = pytest.param("cuda", marks=[pytest.mark.gpu])


def written_out_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    kind: AttentionKind,
    sink: Tensor | None = None,
    resident: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """Truth: causal softmax attention, one sample after the other, no sharing.

    A shared token has one output, taken from the first sample that holds it: all agree. Keys and
    values of ``resident`` prefix rows stand before the samples that continue them.
    """
    own_v = v
    starts = np.cumsum([len(x) for x in (k, *(kept_k for kept_k, _ in resident))])
    k, v = torch.cat([k, *(x for x, _ in resident)]), torch.cat([v, *(x for _, x in resident)])
    before = {
        first: torch.arange(begin, end) + starts[spans.row]
        for spans in layout.resident_spans
        for (first, _), (begin, end) in zip(spans.q_spans.tolist(), spans.kv_spans.tolist())
    }
    repeats = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q[..., :1]).expand(-1, -1, v.shape[2]).clone()
    seen = torch.zeros(layout.total_tokens, dtype=torch.bool)
    for i in range(layout.num_samples):
        index = layout.sample_indices(i).to(q.device)
        tail = before.get(int(index[0]), index[:0]).to(q.device)
        keys = torch.cat([tail, index])
        qs, ks, vs = q[index], k[keys], v[keys]
        ks, vs = (x.repeat_interleave(repeats, 1) for x in (ks, vs))
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * kind.scale(q.shape[2])
        if kind.softcap is not None:
            scores = kind.softcap * torch.tanh(scores / kind.softcap)
        hidden = torch.ones(len(index), len(keys), dtype=torch.bool, device=q.device)
        hidden, passed = hidden.triu(len(tail) + 1), hidden
        if kind.window is not None:
            hidden |= passed.tril(len(tail) - kind.window - 1)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sink is not None:
            scores = torch.cat([scores, sink[:, None, None].expand(-1, len(index), 1)], dim=2)
        weights = scores.softmax(-1)[..., : len(keys)]
        rows = torch.einsum("hqk,khd->qhd", weights, vs)
        new = ~seen[index.cpu()].to(q.device)
        out = out.index_put((index[new],), rows[new])
        seen[index.cpu()] = True
    padding = own_v[layout.unique_tokens :].repeat_interleave(repeats, 1)
    return torch.cat([out[: layout.unique_tokens], padding])


def make_inputs(layout: PackedLayout, heads: int, kv_heads: int, dim: int, dtype=torch.float64):
    rows = layout.total_tokens
    q, k, v = (torch.randn(rows, h, dim, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    return [x.to(dtype) for x in (2 * q, k, v)], torch.randn_like(q).to(dtype)


def gradients(function, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


NAMES = ("out", "dq", "dk", "dv")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_fp64_equals_written_out(backend) -> None:
    depths_seen = set()

    @settings(max_examples=200)
    @given(forest=forests(), heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]))
    def compare(forest, heads) -> None:
        layout, _ = forest
        inputs, dout = make_inputs(layout, *heads, dim=8)
        scale = 0.37
        got = gradients(
            lambda q, k, v: prefix_grouped_attention(q, k, v, layout, scale, backend), inputs, dout
        )
        want = gradients(
            lambda *x: written_out_attention(*x, layout, AttentionKind(softmax_scale=scale)),
            inputs,
            dout,
        )
        for name, g, w in zip(NAMES, got, want):
            # A query that sees one key has no gradient: what is left is rounding of values near 1.
            assert_close(name, g, w, 1e-10, least_scale=1e-3)
        depths_seen.add(layout.forest.depth)

    compare()
    is_deep = depths_seen >= {0, 1, 2, 3, 4} and max(depths_seen) > 4
    assert is_deep, f"the forests were not deep enough: {depths_seen}"


def deep_layout(pad_to_multiple: int = 8) -> PackedLayout:
    stem = list(range(40))
    samples = [stem + [100 + i] * 9 for i in range(3)]
    samples += [stem + [7] * 11 + [200 + i] * (5 + 3 * i) for i in range(3)]
    trees = [PrefixTree.from_sequences(samples), PrefixTree.from_group(33, [17] * 4)]
    return pack_trees(trees, pad_to_multiple)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_fp32(heads) -> None:
    layout = deep_layout()
    inputs, dout = make_inputs(layout, *heads, dim=16, dtype=torch.float32)
    got = gradients(lambda *x: prefix_grouped_attention(*x, layout), inputs, dout)
    inputs64 = [x.double() for x in inputs]
    want = gradients(
        lambda *x: written_out_attention(*x, layout, AttentionKind()), inputs64, dout.double()
    )
    for name, g, w in zip(NAMES, got, want):
        assert g.dtype == torch.float32
        assert_close(name, g, w, 1e-5)
    assert layout.forest.depth == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_16_bit_error_is_at_most_twice_an_ordinary_attentions(dtype, heads, device) -> None:
    layout = deep_layout()
    inputs, dout = make_inputs(layout, *heads, dim=64, dtype=dtype)
    inputs, dout = [x.to(device) for x in inputs], dout.to(device)
    got = gradients(lambda *x: prefix_grouped_attention(*x, layout), inputs, dout)

    def ordinary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same dtype's own kernel on every written-out sample, gradients summed by autograd."""
        return written_out_kernel(q, k, v, layout)

    control = gradients(ordinary, inputs, dout)
    truth = gradients(
        lambda *x: written_out_attention(*x, layout, AttentionKind()),
        [x.double() for x in inputs],
        dout.double(),
    )
    for name, g, c, t in zip(NAMES, got, control, truth):
        assert g.dtype == dtype
        assert_close_to_control(name, g, c, t)


def written_out_kernel(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    seen = torch.zeros(layout.total_tokens, dtype=torch.bool)
    for i in range(layout.num_samples):
        index = layout.sample_indices(i).to(q.device)
        qs, ks, vs = (
            x[index].repeat_interleave(r, 1).transpose(0, 1)[None]
            for x, r in ((q, 1), (k, repeats), (v, repeats))
        )
        rows = torch.nn.functional.scaled_dot_product_attention(qs, ks, vs, is_causal=True)
        new = ~seen[index.cpu()].to(q.device)
        out = out.index_put((index[new],), rows[0].transpose(0, 1)[new])
        seen[index.cpu()] = True
    tail = slice(layout.unique_tokens, None)
    return torch.cat([out[: layout.unique_tokens], v[tail].repeat_interleave(repeats, 1)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_siblings_are_isolated_bit_for_bit(dtype) -> None:
    layout = deep_layout()
    inputs, dout = make_inputs(layout, 4, 2, dim=16, dtype=dtype)
    changed = torch.from_numpy(layout.forest.segment_starts[2:3])
    segment = int(layout.segment_ids[changed])
    rows = layout.segment_ids == segment
    assert int(layout.multiplicity[rows][0]) == 1, "the changed segment is one sample's own"
    before = gradients(lambda *x: prefix_grouped_attention(*x, layout), inputs, dout)
    other = [torch.where(rows[:, None, None], torch.randn_like(x), x) for x in inputs]
    after = gradients(lambda *x: prefix_grouped_attention(*x, layout), other, dout)
    own = layout.segment_ids[rows.logical_not() & (layout.multiplicity == 1)].unique()
    untouched = torch.isin(layout.segment_ids, own)
    assert int(untouched.sum()) > 50
    for name, b, a in zip(NAMES, before, after):
        assert torch.equal(b[untouched], a[untouched]), f"{name} of a sibling changed"
        assert not torch.equal(b[rows], a[rows]), f"{name} of the changed response did not"
    # The shared prefix sees no response, so its output stays; its gradient must not.
    prefix = layout.sample_indices(0)[:5]
    assert torch.equal(before[0][prefix], after[0][prefix])
    assert not torch.equal(before[2][prefix], after[2][prefix])


def test_gradient_of_the_last_shared_token_counts_every_child() -> None:
    layout = pack_trees([PrefixTree.from_group(4, [3, 3, 3])])
    inputs, _ = make_inputs(layout, 2, 2, dim=8)
    shares = []
    for i in range(3):
        dout = torch.zeros(layout.total_tokens, 2, 8, dtype=torch.float64)
        dout[layout.sample_indices(i)[4:]] = 1.0
        shares.append(gradients(lambda *x: prefix_grouped_attention(*x, layout), inputs, dout)[3])
    total = torch.ones(layout.total_tokens, 2, 8, dtype=torch.float64)
    total[:4] = 0
    whole = gradients(lambda *x: prefix_grouped_attention(*x, layout), inputs, total)[3]
    assert_close("dv", whole[3], sum(share[3] for share in shares), 1e-12)
    assert all(share[3].abs().max() > 0 for share in shares)


def test_strided_inputs_are_read_in_place() -> None:
    layout = deep_layout()
    mixed = torch.randn(layout.total_tokens, 8, 48, dtype=torch.float64)
    q, k, v = mixed[:, :4, :16], mixed[:, 4:6, 16:32], mixed[:, 6:, 32:]
    got = prefix_grouped_attention(q, k, v, layout)
    want = written_out_attention(*(x.contiguous() for x in (q, k, v)), layout, AttentionKind())
    assert not q.is_contiguous()
    assert_close("out", got, want, 1e-12)


def test_the_same_inputs_give_the_same_bits() -> None:
    layout = deep_layout()
    inputs, dout = make_inputs(layout, 4, 2, dim=16, dtype=torch.float32)
    runs = [
        gradients(lambda *x: prefix_grouped_attention(*x, layout), inputs, dout) for _ in range(3)
    ]
    for name, first, *others in zip(NAMES, *runs):
        assert all(torch.equal(first, other) for other in others), name


def test_auto_says_what_it_picked() -> None:
    inputs = AttentionInputs(torch.device("cpu"), torch.float32, 64, 4, 2)
    assert select_backend(inputs).name == available_backends(inputs)[0]
    assert available_backends(inputs) in (["cpu_fused", "cpu", "reference"], ["cpu", "reference"])
    half = replace(inputs, dtype=torch.bfloat16)
    assert available_backends(half) == ["cpu", "reference"]
    assert available_backends()[-1] == "reference"


@pytest.mark.parametrize("has_triton", [True, False])
def test_the_device_and_what_is_installed_decide_what_merges(monkeypatch, has_triton) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if has_triton else None)
    assert merge_implementation("cpu") == "plain"
    assert merge_implementation(torch.device("cuda", 1)) == ("triton" if has_triton else "plain")


def test_backward_runs_once_only() -> None:
    layout = deep_layout()
    (q, k, v), _ = make_inputs(layout, 2, 2, dim=8)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(
        prefix_grouped_attention(q, k, v, layout).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def call(**changes):
    layout = deep_layout()
    (q, k, v), _ = make_inputs(layout, 4, 2, dim=8)
    arguments = {"q": q, "k": k, "v": v, "layout": layout} | changes
    return prefix_grouped_attention(**arguments)


def rows() -> int:
    return deep_layout().total_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"q": torch.zeros(rows() - 1, 4, 8)}, "tokens, the layout"),
        (lambda: {"q": torch.zeros(rows(), 32)}, r"must be \[tokens, heads, head_dim\]"),
        (lambda: {"k": torch.zeros(rows(), 2, 8)}, "k is torch.float32 on cpu, q is torch.float64"),
        (lambda: {"q": torch.zeros(rows(), 3, 8, dtype=torch.float64)}, "multiple of the 2 heads"),
        (lambda: {"q": torch.zeros(rows(), 0, 8, dtype=torch.float64)}, "none of them 0"),
        (
            lambda: {n: torch.zeros(rows(), 2, 0, dtype=torch.float64) for n in "qkv"},
            "head_dim 0 at least 1",
        ),
        (lambda: {"v": torch.zeros(rows(), 2, 4, dtype=torch.float64)}, "must have equal shapes"),
        (lambda: {"q": torch.zeros(rows(), 4, 16, dtype=torch.float64)}, "q's head_dim 16"),
        (lambda: {"softmax_scale": float("nan")}, "softmax_scale=nan must be finite"),
        (lambda: {"softmax_scale": float("inf")}, "softmax_scale=inf must be finite"),
        (lambda: {"backend": "triton"}, "attention backend 'triton' is unknown"),
        (lambda: {"backend": "flash"}, "flash needs tensors on cuda"),
        (lambda: {"backend": "flash_attn"}, "flash_attn needs tensors on cuda"),
        (lambda: {"layout": deep_layout().forest}, "layout is PrefixTree; pass what pack_trees"),
        (
            lambda: {n: torch.zeros(rows(), 2, 8, dtype=torch.int64) for n in "qkv"},
            "needs a floating-point type",
        ),
    ],
)
def test_refusals(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes())
    assert call().shape == (rows(), 4, 8)


def test_auto_never_falls_back_to_the_reference() -> None:
    layout = deep_layout()
    q = torch.zeros(layout.total_tokens, 2, 8, dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match="backend='reference' takes any"):
        prefix_grouped_attention(q, q, q, layout)
