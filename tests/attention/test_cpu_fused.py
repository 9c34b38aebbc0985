"""The fused CPU kernel: exact cover by tiles, block edges, dtypes, its build and its refusals."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg import prefix_grouped_attention as attend
from megatron_pg.attention import (
    AttentionInputs,
    AttentionKind,
    ResidentKV,
    make_attention_plan,
    select_backend,
)
from megatron_pg.attention.backends.cpu_fused import build
from megatron_pg.attention.backends.cpu_fused.tiles import (
    PANEL_KEYS,
    PRODUCT_ROWS,
    TILE_ROWS,
    make_tiles,
)
from megatron_pg.tree import ResidentSpans, dense_mask
from tests.ranks import Pool
from tests.strategies import forests
from tests.utils import assert_close, needs_cpu_fused

NAMES = ("out", "dq", "dk", "dv")
INPUTS = AttentionInputs(torch.device("cpu"), torch.float32, 64, 4, 2)


def make_inputs(
    layout: PackedLayout,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    value_dim: int | None = None,
):
    """Strided views: heads of one projection side by side, as models have them."""
    value_dim = value_dim or dim
    mixed = torch.randn(layout.total_tokens, heads + 2 * kv_heads, max(dim, value_dim), dtype=dtype)
    q, k, v = mixed.split([heads, kv_heads, kv_heads], dim=1)
    inputs = [2 * q[..., :dim], k[..., :dim], v[..., :value_dim]]
    return inputs, torch.randn(layout.total_tokens, heads, value_dim, dtype=dtype)


PLAIN = AttentionKind(softmax_scale=0.37)


def results(
    backend: str,
    layout: PackedLayout,
    inputs: list[Tensor],
    dout: Tensor,
    kind: AttentionKind = PLAIN,
    **more,
):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, layout, backend=backend, kind=kind, **more)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def times_covered(layout: PackedLayout, window: int | None = None) -> Tensor:
    """How often tiles and ranges compute each pair of the row."""
    tiles, ranges, _ = make_tiles(make_attention_plan(layout, window)).tables
    count = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.int64)
    for q_start, q_len, first, end, _ in tiles.tolist():
        assert 0 < q_len <= TILE_ROWS
        for source, kv_start, kv_len, _, _, q_offset, first_key in ranges[first:end].tolist():
            pairs = torch.ones(q_len, kv_len, dtype=torch.int64)
            pairs = pairs if q_offset < 0 else pairs.tril(q_offset)
            count[q_start : q_start + q_len, kv_start : kv_start + kv_len] += pairs.triu(
                max(first_key, -q_len)
            )
            assert source == 0 and first_key < min(kv_len, PANEL_KEYS)
    return count


@settings(max_examples=100)
@given(
    forest=forests(),
    factor=st.sampled_from([1, 29]),
    window=st.sampled_from([None, 0, 1, 7, 64, 150]),
)
def test_tiles_cover_every_visible_pair_once(forest, factor, window) -> None:
    trees = forest[0].forest
    # Longer segments, so that they take several tiles.
    tree = PrefixTree(trees.segment_lens * factor, trees.segment_parents, trees.sample_segments)
    layout = pack_trees([tree], 8)
    visible = dense_mask(layout, window)[: layout.unique_tokens, : layout.unique_tokens]
    covered = times_covered(layout, window)
    padding = covered[layout.unique_tokens :].sum() + covered[:, layout.unique_tokens :].sum()
    assert padding == 0
    assert torch.equal(covered[: layout.unique_tokens, : layout.unique_tokens], visible.long())


def test_a_long_segment_takes_even_tiles() -> None:
    tiles, ranges, panels = make_tiles(
        make_attention_plan(pack_trees([PrefixTree.from_group(300, [20, 140])]))
    ).tables
    # Of 300 tokens three times 102, 102, 96; of 140 two, multiples of what a product takes.
    assert tiles[:, 1].tolist() == [102, 102, 96, 20, 72, 68]
    assert all(n % PRODUCT_ROWS == 0 for n in (102, 72))
    assert tiles[:, 3].diff(prepend=torch.tensor([0])).tolist() == [1, 1, 1, 2, 2, 2]
    # A tile sees its own segment up to its last query, after its prefix.
    assert ranges[-1, :-1].tolist() == [0, 320, 140, 336, 140, 72]
    assert panels.tolist() == [[0, 0, 300, 0], [0, 300, 20, 304], [0, 320, 140, 336]]


EDGES = [1, 5, 6, 7, 15, 16, 17, 63, 64, 65, 131, 132, 133, 255, 256, 257, 265]
WINDOWS = [None, None, 0, 1, 5, 6, 15, 16, 63, 64, 70, 131, 200, 255, 256, 300]


@needs_cpu_fused
def test_fp64_at_the_edges_of_tiles_blocks_and_panels() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=80, deadline=None)
    @given(
        lens=st.lists(st.sampled_from(EDGES), min_size=2, max_size=4),
        heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
        dim=st.sampled_from([8, 24, 32, 40, 64]),
        value_dim=st.sampled_from([None, 8, 48]),
        window=st.sampled_from(WINDOWS),
        softcap=st.sampled_from([None, None, 5.0]),
        trees=st.integers(1, 2),
    )
    def compare(lens, heads, dim, value_dim, window, softcap, trees) -> None:
        layout = pack_trees([PrefixTree.from_group(lens[0], lens[1:])] * trees, 8)
        inputs, dout = make_inputs(layout, *heads, dim, torch.float64, value_dim)
        kind = replace(PLAIN, window=window, softcap=softcap, value_dim=value_dim)
        got = results("cpu_fused", layout, inputs, dout, kind)
        for name, g, w in zip(NAMES, got, results("reference", layout, inputs, dout, kind)):
            # A query that sees one key has no gradient: what is left is rounding of values near 1.
            assert_close(name, g, w, 1e-12, least_scale=1)
        seen["several blocks of keys"] += max(lens) > 256
        seen["several samples"] += len(lens) > 2
        reach = layout.max_position if window is None else window
        seen["windows across blocks"] += 64 < reach < layout.max_position
        seen["windows in a panel"] += reach < min(64, layout.max_position)

    compare()
    assert len(+seen) == 4, f"the lengths did not meet every edge: {seen}"


@needs_cpu_fused
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_fp32_error_is_at_most_that_of_pytorchs_kernel(heads, dim) -> None:
    compare_errors(heads, dim, PLAIN, control="cpu")


@needs_cpu_fused
@pytest.mark.parametrize(
    ("changes", "control"),
    [
        (dict(window=150), "cpu"),
        (dict(value_dim=128), "cpu"),
        # Bounds so far above all scores that what is small must stay accurate.
        (dict(softcap=300.0), "reference"),
        (dict(softcap=2.0, window=40, value_dim=32), "reference"),
    ],
)
def test_fp32_error_of_other_kinds(changes, control) -> None:
    compare_errors((6, 2), 64, replace(PLAIN, **changes), control)


def compare_errors(heads: tuple[int, int], dim: int, kind: AttentionKind, control: str) -> None:
    layout = pack_trees([PrefixTree.from_group(517, [258, 301, 301, 40])], 8)
    inputs, dout = make_inputs(layout, *heads, dim, torch.float32, kind.value_dim)
    got, ordinary = (results(name, layout, inputs, dout, kind) for name in ("cpu_fused", control))
    doubles = [x.double() for x in inputs]
    exact = results("reference", layout, doubles, dout.double(), kind)
    for name, g, c, t in zip(NAMES, got, ordinary, exact):
        assert g.dtype == torch.float32
        error, yardstick = ((x.double() - t).abs().max() for x in (g, c))
        # The reference keeps all probabilities and knows no log-sum-exp, whose rounding adds up.
        factor = 1.5 if control == "cpu" else 4
        assert error <= factor * yardstick > 0, name


@needs_cpu_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_far_apart(dtype) -> None:
    """Weights that underflow, and rows whose maximum comes in their last block of keys."""
    layout = pack_trees([PrefixTree.from_group(600, [300, 300])])
    inputs, dout = make_inputs(layout, 2, 2, 16, dtype)
    inputs[0] *= 200
    inputs[1] *= torch.linspace(0.1, 3, layout.total_tokens, dtype=dtype)[:, None, None]
    doubles = [x.double() for x in inputs]
    want = results("reference", layout, doubles, dout.double())
    for name, g, w in zip(NAMES, results("cpu_fused", layout, inputs, dout), want):
        assert g.isfinite().all()
        assert_close(name, g, w, 1e-10 if dtype == torch.float64 else 1e-2)
    weights = torch.softmax(0.37 * doubles[0][-1, 0] @ doubles[1][:600, 0].T, 0)
    assert (weights < torch.finfo(dtype).tiny).any(), "some weights underflow"


@needs_cpu_fused
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_who_sees_it(bad) -> None:
    layout = pack_trees([PrefixTree.from_group(40, [30, 30])])
    inputs, dout = make_inputs(layout, 2, 2, 16, torch.float32)
    inputs[1][45, :, :] = bad  # in the first response
    out = results("cpu_fused", layout, inputs, dout)[0]
    assert out[45:70].isnan().any(dim=2).any(dim=1).all()
    assert out[:40].isfinite().all() and out[70:].isfinite().all()


@needs_cpu_fused
def test_bits_do_not_depend_on_threads() -> None:
    trees = [PrefixTree.from_group(300, [140, 20, 7]), PrefixTree.from_group(33, [9] * 3)]
    layout = pack_trees(trees)
    inputs, dout = make_inputs(layout, 6, 2, 32, torch.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results("cpu_fused", layout, inputs, dout))
    finally:
        torch.set_num_threads(before)
    for name, first, *others in zip(NAMES, *runs):
        assert all(torch.equal(first, other) for other in others), name


@needs_cpu_fused
def test_trees_on_one_resident_prefix_add_to_its_gradient() -> None:
    tree = PrefixTree.from_group(71, [30, 5]).without_prefix([70, 0, 0])
    tokens = tree.unique_tokens
    q_spans = np.array([[0, tokens], [tokens, 2 * tokens]])
    spans = ResidentSpans(0, q_spans, np.array([[0, 70], [70, 140]]))
    layout = pack_trees([tree, tree], 8, [spans])
    inputs, dout = make_inputs(layout, 4, 2, 32, torch.float64)
    k, v = torch.randn(2, 140, 2, 32, dtype=torch.float64)
    kept = {name: ResidentKV(k, v) for name in ("cpu_fused", "reference")}
    got, want = (
        [results(name, layout, inputs, dout, resident=[kv]) for _ in range(2)][-1]
        for name, kv in kept.items()
    )
    for name, g, w in zip(NAMES, got, want):
        assert_close(name, g, w, 1e-13)
    ours, truth = kept.values()
    assert_close("resident dk", ours.dk, truth.dk, 1e-13)
    assert_close("resident dv", ours.dv, truth.dv, 1e-13)
    assert truth.dk.abs().max() > 0


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(**changed) -> str:
        fields = dict(device=torch.device("cpu"), dtype=torch.float32, head_dim=64)
        fields |= dict(num_heads=4, num_kv_heads=2) | changed
        with pytest.raises(ValueError) as raised:
            select_backend(AttentionInputs(**fields), "cpu_fused")
        return str(raised.value)

    assert "got torch.bfloat16" in refusal(dtype=torch.bfloat16)
    assert "multiples of 16, got 24" in refusal(head_dim=24)
    assert "multiples of 8, got 12" in refusal(head_dim=12, dtype=torch.float64)
    assert "got cuda" in refusal(device=torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
        assert "PyTorch finds AVX2" in refusal()
        assert select_backend(INPUTS).name == "cpu"
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "found no no-such-compiler" in refusal()
    assert select_backend(INPUTS).name == "cpu"


CLANG = """#!/bin/sh
[ "$1" = --version ] && exit 0
echo "<stdin>:7:12: error: use of undeclared identifier '__builtin_shuffle'" >&2
exit 1
"""


def test_a_compiler_that_is_not_gcc_is_never_picked(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    clang = tmp_path / "clang++"
    clang.write_text(CLANG)
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", f"{clang} -stdlib=libc++")
    assert select_backend(INPUTS).name == "cpu"
    with pytest.raises(ValueError, match=r"needs GCC 10.*undeclared identifier.*CXX names another"):
        select_backend(INPUTS, "cpu_fused")
    # What is in the cache needs no compiler.
    build._compiler_refusal.cache_clear()
    build.compiled_path().parent.mkdir(parents=True)
    build.compiled_path().touch()
    assert select_backend(INPUTS).name == "cpu_fused"


@needs_cpu_fused
def test_the_compiler_here_passes_what_the_source_needs(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert build.compiler_refusal() is None
    monkeypatch.setattr(build, "_PROBE", build._PROBE.replace("__builtin_shuffle", "no_such_word"))
    build._compiler_refusal.cache_clear()
    assert "no_such_word" in str(build.compiler_refusal())
    build._compiler_refusal.cache_clear()


def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_SOURCE", tmp_path / "broken.cpp")
    (tmp_path / "broken.cpp").write_text("this is no C++")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(
        RuntimeError, match="(?s)could not be compiled by\n  false .*Use backend='cpu'"
    ):
        build.compiled()
    assert not list(tmp_path.rglob("*.so"))


def call_with_compiler(compiler: str, cache: str) -> tuple[int, ...]:
    os.environ |= {"CXX": compiler, "TORCH_EXTENSIONS_DIR": cache}
    q, k, v = torch.randn(3, 40, 2, 16)
    layout = pack_trees([PrefixTree.from_group(20, [10, 10])])
    return tuple(attend(q, k, v, layout, backend="cpu_fused").shape)


@needs_cpu_fused
def test_processes_that_start_together_compile_once(
    ranks: Pool, tmp_path: Path, monkeypatch
) -> None:
    """Also where a killed process left its lock."""
    wrapper = tmp_path / "counting-c++"
    # Each process asks it for a few lines first, which are no operators.
    count = f'case "$*" in *tree_attention.cpp*) echo run >> {tmp_path}/runs;; esac'
    wrapper.write_text(f'#!/bin/sh\n{count}\nexec c++ "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    left = build.compiled_path()
    left.parent.mkdir(parents=True)
    left.with_suffix(".lock").touch()
    shapes = ranks.run(3, call_with_compiler, str(wrapper), str(tmp_path / "cache"), timeout=300)
    assert shapes == [(40, 2, 16)] * 3
    assert (tmp_path / "runs").read_text() == "run\n"
    assert left.exists() and not list(left.parent.glob("*.partial"))
