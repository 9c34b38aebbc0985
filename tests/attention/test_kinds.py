"""Windows, sinks, softcap and value sizes against dense attention of every written-out sample."""

from __future__ import annotations

from dataclasses import replace

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
    select_backend,
)
from megatron_pg.tree import ResidentSpans
from tests.utils import assert_close

HEADS, KV_HEADS, DIM = 4, 2, 8
KINDS = {
    "plain": AttentionKind(),
    "scale": AttentionKind(softmax_scale=0.9),
    "window 0": AttentionKind(window=0),
    "window 1": AttentionKind(window=1),
    "window 4": AttentionKind(window=4),
    "window 9": AttentionKind(window=9),
    "window of the whole row": AttentionKind(window=100),
    "sink": AttentionKind(has_sink=True),
    "softcap": AttentionKind(softcap=0.7),
    "smaller values": AttentionKind(value_dim=3),
    "larger values": AttentionKind(value_dim=20),
    "all": AttentionKind(softmax_scale=0.6, window=3, has_sink=True, softcap=1.3, value_dim=5),
}


def written_out(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layout: PackedLayout, kind: AttentionKind
) -> Tensor:
    """Truth: one sample after the other, every pair by its two positions in the sample."""
    group = HEADS // KV_HEADS
    rows: dict[int, Tensor] = {t: v[t].repeat_interleave(group, 0) for t in range(len(q))}
    scale = DIM**-0.5 if kind.softmax_scale is None else kind.softmax_scale
    for i in range(layout.num_samples):
        index = layout.sample_indices(i)
        for place, token in enumerate(index.tolist()):
            first = 0 if kind.window is None else max(0, place - kind.window)
            seen = index[first : place + 1]
            heads = []
            for head in range(HEADS):
                scores = scale * (k[seen, head // group] @ q[token, head])
                if kind.softcap is not None:
                    scores = kind.softcap * torch.tanh(scores / kind.softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if sink is None else sink[head].exp())
                heads.append((weights / total) @ v[seen, head // group])
            # Samples that share the token agree on its output.
            rows[token] = torch.stack(heads)
    return torch.stack([rows[t] for t in range(len(q))])


def deep_layout() -> PackedLayout:
    stem = list(range(7))
    samples = [stem + [10, 11], stem + [12, 13, 14, 20], stem + [12, 13, 14, 21, 22], stem[:3]]
    trees = [PrefixTree.from_sequences(samples), PrefixTree.from_group(6, [3, 5])]
    return pack_trees(trees, 16)


def random_inputs(layout: PackedLayout, kind: AttentionKind) -> tuple[list[Tensor], Tensor]:
    shapes = [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, kind.value_dim or DIM)]
    inputs = [torch.randn(layout.total_tokens, *s, dtype=torch.float64) for s in shapes]
    if kind.has_sink:
        inputs.append(torch.randn(HEADS, dtype=torch.float64))
    dout = torch.randn(layout.total_tokens, HEADS, shapes[2][1], dtype=torch.float64)
    return inputs, dout


def gradients(function, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("name", KINDS)
def test_the_reference_equals_written_out(name: str) -> None:
    layout, kind = deep_layout(), KINDS[name]
    assert layout.forest.depth == 3 and layout.unique_tokens < layout.total_tokens
    inputs, dout = random_inputs(layout, kind)

    def ours(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
        return prefix_grouped_attention(q, k, v, layout, backend="reference", kind=kind, sink=sink)

    def truth(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
        return written_out(q, k, v, sink, layout, kind)

    got, want = gradients(ours, inputs, dout), gradients(truth, inputs, dout)
    for label, g, w in zip(("out", "dq", "dk", "dv", "dsink"), got, want):
        assert_close(label, g, w, 1e-12, least_scale=1e-3)
    if name not in ("plain", "window of the whole row") and kind.value_dim is None:
        plain = prefix_grouped_attention(*inputs[:3], layout, backend="reference")
        assert (plain - got[0]).abs().max() > 1e-3, "the kind changes nothing here"


@pytest.mark.parametrize("window", [0, 2, 5, 9])
def test_windows_reach_into_resident_prefixes(window: int) -> None:
    whole = pack_trees([PrefixTree.from_group(4, [6]), PrefixTree.from_group(8, [2, 5])])
    kind = AttentionKind(window=window)
    (q, k, v), dout = random_inputs(whole, kind)
    # All of both prompts but their last tokens are resident, the second prompt's first.
    first, second = torch.arange(3), torch.arange(10, 17)
    kept_rows = torch.cat([second, first])
    rows = torch.cat([torch.arange(3, 10), torch.arange(17, 25)])
    trees = [PrefixTree.from_group(4, [6]), PrefixTree.from_group(8, [2, 5])]
    cut = [trees[0].without_prefix([3, 0]), trees[1].without_prefix([7, 0, 0])]
    spans = [
        ResidentSpans(0, np.array([[0, 7]]), np.array([[7, 10]])),
        ResidentSpans(0, np.array([[7, 15]]), np.array([[0, 7]])),
    ]
    layout = pack_trees(cut, 1, spans)
    kept = ResidentKV(k[kept_rows], v[kept_rows])
    masked = torch.zeros_like(dout).index_copy(0, rows, dout[rows])

    def resident(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_grouped_attention(
            q, k, v, layout, backend="reference", kind=kind, resident=[kept]
        )

    got = gradients(resident, [x[rows] for x in (q, k, v)], dout[rows])
    want = gradients(
        lambda *x: prefix_grouped_attention(*x, whole, backend="reference", kind=kind),
        [q, k, v],
        masked,
    )
    for label, g, w in zip(("out", "dq", "dk", "dv"), got, want):
        assert_close(label, g, w[rows], 1e-12, least_scale=1e-3)
    assert_close("kept dk", kept.dk, want[2][kept_rows], 1e-12, least_scale=1e-3)
    assert_close("kept dv", kept.dv, want[3][kept_rows], 1e-12, least_scale=1e-3)


FEATURES = {
    "window": (AttentionKind(window=128), r"a window \(window=128\)"),
    "has_sink": (AttentionKind(has_sink=True), r"a sink \(has_sink=True\)"),
    "softcap": (AttentionKind(softcap=30.0), r"a bound on scores \(softcap=30.0\)"),
    "value_dim": (AttentionKind(value_dim=32), r"values of another size \(value_dim=32\)"),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_what_a_backend_does_not_compute_is_refused_by_name(backend: str, feature: str) -> None:
    kind, words = FEATURES[feature]
    chosen = ATTENTION_BACKENDS[backend]
    device = torch.device(chosen.device_type or "cpu")
    dtype = (chosen.dtypes or (torch.float32,))[0]
    inputs = AttentionInputs(device, dtype, 64, 4, 2, kind)
    if feature in chosen.features:
        assert "does not compute" not in (chosen.refusal(inputs) or "")
        return
    message = f"{backend} does not compute {words}.*backend='reference' takes any"
    with pytest.raises(ValueError, match=message):
        select_backend(inputs, backend)
    assert backend not in available_backends(inputs)


def test_values_of_the_queries_size_are_plain() -> None:
    inputs = AttentionInputs(torch.device("cpu"), torch.float32, 64, 4, 2)
    said = replace(inputs, kind=AttentionKind(value_dim=64))
    assert available_backends(said) == available_backends(inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(softmax_scale=0), "softmax_scale=0 must be finite and above 0"),
        (dict(softmax_scale=float("nan")), "softmax_scale=nan must be finite"),
        (dict(softcap=-1.0), "softcap=-1.0 must be finite and above 0"),
        (dict(softcap="30"), "softcap='30' must be finite"),
        (dict(window=-1), "window=-1 must be an integer of at least 0"),
        (dict(window=True), "window=True must be an integer of at least 0"),
        (dict(window=2.5), "window=2.5 must be an integer of at least 0"),
        (dict(value_dim=0), "value_dim=0 must be an integer of at least 1"),
    ],
)
def test_numbers_that_no_attention_has(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionKind(**fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            dict(kind=AttentionKind(), sink=torch.zeros(HEADS)),
            "has_sink=False of the kind",
        ),
        (dict(kind=AttentionKind(has_sink=True)), "has_sink=True of the kind, sink None"),
        (dict(sink=torch.zeros(HEADS)), r"takes AttentionKind\(has_sink=True\)"),
        (
            dict(kind=AttentionKind(has_sink=True), sink=torch.zeros(KV_HEADS)),
            r"shape \(2,\) on cpu, must be one number for each of q's 4 heads",
        ),
        (dict(kind=AttentionKind(), softmax_scale=0.5), "say it in the kind alone"),
        (
            dict(kind=AttentionKind(value_dim=4)),
            r"v has heads of 8, AttentionKind\(value_dim=4\)",
        ),
    ],
)
def test_calls_that_contradict_themselves(call, message: str) -> None:
    layout = deep_layout()
    (q, k, v), _ = random_inputs(layout, AttentionKind())
    with pytest.raises(ValueError, match=message):
        prefix_grouped_attention(q, k, v, layout, backend="reference", **call)


def test_a_chosen_backend_refuses_other_inputs() -> None:
    layout = deep_layout()
    (q, k, v), _ = random_inputs(layout, AttentionKind())
    chosen = select_backend(AttentionInputs.of(q, k), "cpu")
    with pytest.raises(ValueError, match="'cpu', chosen before, takes .* got torch.float8_e5m2"):
        prefix_grouped_attention(
            *(x.to(torch.float8_e5m2) for x in (q, k, v)), layout, backend=chosen
        )
    assert prefix_grouped_attention(q, k, v, layout, backend=chosen).shape == q.shape
