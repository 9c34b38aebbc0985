"""Odd q, k, v and layouts: refused by name, or equal to written-out attention in fp64."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import AttentionInputs, AttentionKind, ResidentKV, available_backends
from megatron_pg.tree import ResidentSpans
from tests.attention.test_attention import NAMES, written_out_attention
from tests.hostile import assert_both_occur, refused, seeds
from tests.utils import assert_close

BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def odd_layout(rng: random.Random) -> PackedLayout:
    """One-token segments, lone samples, chains, stars, deep and equal samples, padding."""
    trees = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["star", "lone", "chain", "deep", "equal", "ragged"])
        if kind == "star":
            lens = [rng.choice([1, 1, 2, 7]) for _ in range(rng.randint(1, 5))]
            trees.append(PrefixTree.from_group(rng.choice([1, 2, 9, 40]), lens))
        elif kind == "lone":
            trees.append(PrefixTree.from_sequences([[1] * rng.randint(1, 5)]))
        elif kind == "chain":
            length = rng.randint(2, 9)
            trees.append(PrefixTree.from_sequences([[1] * (i + 1) for i in range(length)]))
        elif kind == "deep":
            stem = [rng.randint(0, 9) for _ in range(9)]
            trees.append(PrefixTree.from_sequences([stem[:i] + [10 + i] for i in range(1, 9)]))
        elif kind == "equal":
            trees.append(PrefixTree.from_sequences([[3, 1, 2]] * rng.randint(2, 4)))
        else:
            samples = [[rng.randint(0, 1) for _ in range(rng.randint(1, 6))] for _ in range(6)]
            trees.append(PrefixTree.from_sequences(samples, min_shared=rng.choice([1, 2])))
    return pack_trees(trees, pad_to_multiple=rng.choice([1, 1, 2, 8, 64]))


def odd_strides(rng: random.Random, x: Tensor) -> Tensor:
    """The same values behind other strides."""
    kind = rng.randrange(6)
    if kind == 0:
        return x.transpose(0, 2).contiguous().transpose(0, 2)  # head_dim is not last in memory
    if kind == 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 2:
        return torch.cat([x, x], dim=2)[:, :, : x.shape[2]]
    if kind == 3:
        return torch.stack([x, x], dim=3)[..., 0]  # every second number
    if kind == 4:
        return torch.stack([x, x], dim=1).flatten(0, 1)[::2]
    return x


def odd_kind(rng: random.Random, dim: int) -> AttentionKind:
    """Any of the features, each in half of the cases or less; often none."""
    if rng.random() < 0.3:
        return AttentionKind()
    return AttentionKind(
        window=rng.choice([None, None, 0, 1, 2, 5, 12, 10**9]),
        has_sink=rng.random() < 0.4,
        softcap=rng.choice([None, None, None, 0.7, np.float32(20)]),
        value_dim=rng.choice([None, None, dim, 1, 8, 16, 33]),
    )


def odd_inputs(
    rng: random.Random,
) -> tuple[PackedLayout, list[Tensor], AttentionKind, str]:
    """A layout, q, k, v and a sink where the kind has one, and a backend that takes them."""
    torch.manual_seed(rng.randrange(2**31))
    layout = odd_layout(rng)
    dtype = rng.choice(list(BOUNDS))
    heads, kv_heads = rng.choice([(1, 1), (2, 1), (4, 2), (6, 3), (5, 5)])
    dim = rng.choice([1, 3, 8, 16, 20, 64])
    kind, names = AttentionKind(), []
    while not names:
        kind = odd_kind(rng, dim)
        asked = AttentionInputs(torch.device("cpu"), dtype, dim, heads, kv_heads, kind)
        names = [name for name in available_backends(asked) if name != "reference"]
    rows, value_dim = layout.total_tokens, kind.value_dim or dim
    shapes = [(rows, heads, dim), (rows, kv_heads, dim), (rows, kv_heads, value_dim)]
    q, k, v = (odd_strides(rng, torch.randn(shape).to(dtype)) for shape in shapes)
    if rng.random() < 0.2:
        k = k[:1].expand(shapes[1])  # one row of memory
    if rng.random() < 0.2:
        v = v[:, :1].expand(shapes[2])  # one head of memory
    inputs = [q, k, v]
    if kind.has_sink:
        inputs.append(torch.randn(heads).to(rng.choice([dtype, torch.float32])))
    return layout, inputs, kind, rng.choice(names)


def out_shape(inputs: list[Tensor]) -> tuple[int, int, int]:
    return (*inputs[0].shape[:2], inputs[2].shape[2])


def attention(layout: PackedLayout, kind: AttentionKind, backend: str) -> Any:
    """Of q, k, v and a sink where the kind has one."""
    return lambda q, k, v, sink=None: prefix_grouped_attention(
        q, k, v, layout, backend=backend, kind=kind, sink=sink
    )


def results(
    function: Any, inputs: list[Tensor], dout: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Output and gradients; None for inputs that want none."""
    leaves = [x.detach().requires_grad_(w) for x, w in zip(inputs, wanted)]
    out = function(*leaves)
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("seed", seeds())
def test_what_is_accepted_is_right(seed: int) -> None:
    rng = random.Random(seed)
    layout, inputs, kind, backend = odd_inputs(rng)
    dtype, scale = inputs[0].dtype, rng.choice([None, 1, 0.37, np.float32(2.5)])
    kind = replace(kind, softmax_scale=scale)
    wanted = tuple(rng.random() < 0.7 for _ in inputs)
    dout = odd_strides(rng, torch.randn(out_shape(inputs)).to(dtype))
    before = [x.clone() for x in inputs]
    got = results(attention(layout, kind, backend), inputs, dout, wanted)
    used = kind.scale(inputs[0].shape[2])
    want = results(
        lambda q, k, v, sink=None: written_out_attention(q, k, v, layout, kind, sink),
        [x.double().contiguous() for x in inputs],
        dout.double(),
        wanted,
    )
    # What is left of gradients that cancel is rounding of terms up to this size.
    sizes = [x.double().norm(dim=-1).max().item() for x in (*inputs[:3], dout)]
    terms = used * max(sizes[:2]) * sizes[2] * sizes[3]
    for name, x, g, w in zip((*NAMES, "dsink"), (dout, *inputs), got, want):
        assert (g is None) == (w is None), name
        if g is not None and w is not None:
            assert g.dtype == x.dtype and g.shape == w.shape
            least = 0.2 * terms if name in ("dq", "dk") else 0.1
            if name == "dsink":
                least = sizes[2] * sizes[-1]
            bound = max(BOUNDS[dtype], BOUNDS[x.dtype])
            assert_close(f"{backend} {name}", g, w, bound, least_scale=least)
    assert all(torch.equal(x, was) for x, was in zip(inputs, before)), "an input was changed"


@pytest.mark.parametrize("seed", seeds())
def test_values_that_are_not_finite_stay_in_their_samples(seed: int) -> None:
    rng = random.Random(seed)
    layout, inputs, kind, backend = odd_inputs(rng)
    kind = replace(kind, softmax_scale=0.3)
    inputs = [x.contiguous() for x in inputs]
    token = rng.randrange(layout.unique_tokens)
    value = rng.choice([float("nan"), float("inf"), -float("inf")])
    touched = {i for i in range(layout.num_samples) if token in layout.sample_indices(i)}
    clean = [i for i in range(layout.num_samples) if i not in touched]
    rows = torch.zeros(layout.total_tokens, dtype=torch.bool)
    for i in clean:
        rows[layout.sample_indices(i)] = True
    # What a sample shares with the token's samples gets a gradient from them.
    own = rows.clone()
    for i in touched:
        own[layout.sample_indices(i)] = False
    everywhere = (True,) * len(inputs)
    dout = torch.randn(out_shape(inputs)).to(inputs[0].dtype)
    want = results(attention(layout, kind, backend), inputs, dout, everywhere)
    spoilt = rng.randrange(3)
    inputs[spoilt] = inputs[spoilt].clone()
    inputs[spoilt][token] = value
    got = results(attention(layout, kind, backend), inputs, dout, everywhere)
    before = layout.position_ids < layout.position_ids[token]
    assert torch.equal(got[0][rows & ~before], want[0][rows & ~before]), "out of another sample"
    for name, g, w in zip(NAMES[1:], got[1:4], want[1:4]):
        assert torch.equal(g[own], w[own]), f"{name} of another sample"
    if value != value or spoilt == 0:
        assert got[0][token].isnan().any(), "no number, but it went by unseen"


def as_given(**changes: Any) -> dict[str, Any]:
    layout = pack_trees([PrefixTree.from_group(3, [2, 2])], pad_to_multiple=4)
    q, k, v = torch.randn(3, layout.total_tokens, 2, 8)
    return dict(q=q, k=k, v=v, layout=layout) | changes


def spoil(rng: random.Random) -> tuple[dict[str, Any], list[str]]:
    """Arguments of which one is none, and what the refusal names."""
    given = as_given()
    name = rng.choice("qkv")
    x: Tensor = given[name]
    changes: list[tuple[dict[str, Any], list[str]]] = [
        ({name: x.numpy()}, [name, "ndarray"]),
        ({name: x.tolist()}, [name, "list"]),
        ({name: None}, [name, "NoneType"]),
        ({name: x.to_sparse()}, [name, "dense"]),
        ({name: x[0]}, [name, "[tokens, heads, head_dim]"]),
        ({name: x[None]}, [name, "[tokens, heads, head_dim]"]),
        ({name: x[:0]}, [name, "has 0 tokens"]),
        ({name: torch.cat([x, x])}, [name, "16 tokens", "8"]),
        ({name: x.double()}, ["torch.float64", "agree"]),
        ({name: x.bfloat16()}, ["torch.bfloat16", "agree"]),
        ({name: x.to("meta")}, ["meta", "agree"]),
        ({n: given[n].to("meta") for n in "qkv"}, ["no attention backend", "meta"]),
        ({n: given[n].long() for n in "qkv"}, ["torch.int64", "floating-point"]),
        ({n: given[n].bool() for n in "qkv"}, ["torch.bool", "floating-point"]),
        ({n: given[n].to(torch.complex64) for n in "qkv"}, ["torch.complex64", "floating-point"]),
        ({n: given[n].to(torch.float8_e4m3fn) for n in "qkv"}, ["float8_e4m3fn", "reference"]),
        ({"q": torch.randn(8, 3, 8)}, ["3 heads", "2 heads"]),
        ({"q": torch.randn(8, 0, 8)}, ["0 heads"]),
        ({"k": torch.randn(8, 1, 8)}, ["equal shapes"]),
        ({"v": torch.randn(8, 2, 4)}, ["equal shapes"]),
        ({n: torch.randn(8, 2, 0) for n in "qkv"}, ["head_dim 0"]),
        ({"layout": None}, ["layout", "NoneType", "pack_trees"]),
        ({"layout": given["layout"].forest}, ["layout", "PrefixTree", "pack_trees"]),
        ({"layout": [[1, 2]]}, ["layout", "list", "pack_trees"]),
        ({"softmax_scale": "0.5"}, ["softmax_scale", "'0.5'"]),
        ({"softmax_scale": torch.ones(1, requires_grad=True)}, ["softmax_scale", "tensor"]),
        ({"softmax_scale": 1j}, ["softmax_scale", "1j"]),
        ({"softmax_scale": float("nan")}, ["softmax_scale", "nan"]),
        ({"softmax_scale": -float("inf")}, ["softmax_scale", "-inf"]),
        ({"softmax_scale": 0}, ["softmax_scale=0", "above 0"]),
        ({"softmax_scale": -0.5}, ["softmax_scale=-0.5", "above 0"]),
        ({"backend": None}, ["backend", "None", "auto"]),
        ({"backend": ["cpu"]}, ["backend", "['cpu']", "auto"]),
        ({"backend": "CPU"}, ["backend", "'CPU'", "cpu"]),
        ({"backend": ""}, ["backend", "''", "auto"]),
    ]
    return rng.choice(changes)


@pytest.mark.parametrize("seed", seeds())
def test_what_is_no_input_is_refused(seed: int) -> None:
    rng = random.Random(seed)
    changes, names = spoil(rng)
    with refused(*names):
        prefix_grouped_attention(**as_given(**changes))


def test_without_a_change_it_is_accepted() -> None:
    accepted = [prefix_grouped_attention(**as_given()).shape == (8, 2, 8)]
    with refused():
        prefix_grouped_attention(**as_given(q=None))
    assert_both_occur([*accepted, False])


RESIDENT = {
    "another device": (lambda x: x.to("meta"), "meta"),
    "another dtype": (lambda x: x.double(), "torch.float64"),
    "other heads": (lambda x: x[:, :1], "shape (5, 1, 8)"),
    "too short": (lambda x: x[:2], "sees 3 of its tokens"),
    "no head after another": (lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), "strides"),
}


@pytest.mark.parametrize("name", RESIDENT)
@pytest.mark.parametrize("which", ["k", "v"])
def test_resident_keys_and_values_that_do_not_fit(name: str, which: str) -> None:
    change, message = RESIDENT[name]
    tree = PrefixTree(*(np.array(x) for x in ([2], [-1], [0])), resident_lens=np.array([3]))
    layout = pack_trees([tree], 1, [ResidentSpans(0, np.array([[0, 2]]), np.array([[0, 3]]))])
    q, k, v = torch.randn(3, 2, 2, 8)
    kept = dict(zip("kv", torch.randn(2, 5, 2, 8)))
    prefix_grouped_attention(q, k, v, layout, resident=[ResidentKV(**kept)])
    kept[which] = change(kept[which])
    with refused("resident[0]", message):
        prefix_grouped_attention(q, k, v, layout, resident=[ResidentKV(**kept)])
    with refused("1 resident prefix row(s), 0 given"):
        prefix_grouped_attention(q, k, v, layout)
