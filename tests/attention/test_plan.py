"""Plans: every visible pair in exactly one pass; what kernels are told of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.attention import AttentionPlan, make_attention_plan
from megatron_pg.attention.backends.cpu_spans import span_batches
from megatron_pg.attention.backends.cuda_flash import VarlenArguments
from megatron_pg.attention.backends.torch_cuda import TorchFlashBackend
from megatron_pg.attention.windows import make_windowed_pass
from megatron_pg.tree import dense_mask
from tests.strategies import forests
from tests.utils import ROOT


def covered(plan: AttentionPlan, from_batches: bool) -> torch.Tensor:
    """How often each (q, kv) pair is computed."""
    count = torch.zeros(plan.layout.total_tokens, plan.layout.total_tokens, dtype=torch.int64)
    for p in plan.passes:
        spans = list(zip(p.q_spans.tolist(), p.kv_spans.tolist()))
        if from_batches:
            spans = [
                (
                    (b.q_start + i * b.q_step, b.q_start + i * b.q_step + b.q_len),
                    (b.kv_start + i * b.kv_step, b.kv_start + i * b.kv_step + b.kv_len),
                )
                for b in span_batches(p)
                for i in range(b.num_spans)
            ]
        for (qs, qe), (ks, ke) in spans:
            block = torch.ones(qe - qs, ke - ks, dtype=torch.int64)
            rows = slice(p.q_begin + qs, p.q_begin + qe)
            columns = slice(p.kv_begin + ks, p.kv_begin + ke)
            count[rows, columns] += block.tril() if p.causal else block
    return count


def forks_above(layout: PackedLayout) -> list[int]:
    """Ancestors of every segment that have several children."""
    parents = layout.forest.segment_parents.tolist()
    forks: list[int] = []
    for parent in parents:
        forks.append(0 if parent < 0 else forks[parent] + (parents.count(parent) > 1))
    return forks


@settings(max_examples=200)
@given(forests())
def test_passes_cover_the_mask_once(forest: tuple[PackedLayout, list[list[int]]]) -> None:
    layout, _ = forest
    plan = make_attention_plan(layout)
    visible = dense_mask(layout).to(torch.int64)
    visible[layout.unique_tokens :] = 0
    assert torch.equal(covered(plan, from_batches=False), visible)
    assert torch.equal(covered(plan, from_batches=True), visible)
    assert len(plan.passes) == 1 + max(forks_above(layout))
    assert sum(p.attention_pairs for p in plan.passes) == layout.forest.attention_pairs


@settings(max_examples=200)
@given(forests())
def test_cu_seqlens_say_the_same(forest: tuple[PackedLayout, list[list[int]]]) -> None:
    layout, _ = forest
    plan = make_attention_plan(layout)
    prepared = TorchFlashBackend().prepare(plan, torch.device("cpu"))
    assert prepared.unique_tokens == layout.unique_tokens
    # The first pass is given the row's padding too, as a gap.
    first = prepared.passes[0]
    assert first.queries == first.keys == slice(0, layout.total_tokens)
    assert first.q_rows is first.kv_rows is None
    for p, made in zip(plan.passes, prepared.passes, strict=True):
        args = made.arguments
        cu_q, cu_kv = args.cu_seqlens_q.tolist(), args.cu_seqlens_kv.tolist()
        assert cu_q[0] == cu_kv[0] == 0
        assert cu_q[-1] == made.queries.stop - made.queries.start
        assert cu_kv[-1] == made.keys.stop - made.keys.start
        assert args.cu_seqlens_q.dtype == torch.int32
        meeting = [
            ((qs, qe), (ks, ke))
            for qs, qe, ks, ke in zip(cu_q, cu_q[1:], cu_kv, cu_kv[1:])
            if qe > qs and ke > ks
        ]
        spans = list(zip(map(tuple, p.q_spans.tolist()), map(tuple, p.kv_spans.tolist())))
        assert meeting == spans
        assert args.max_seqlen_q == max(*np.diff(cu_q), 2)
        assert args.max_seqlen_kv == max(np.diff(cu_kv)) and args.causal == p.causal
        if made is first:
            continue
        assert (made.queries, made.keys) == (slice(p.q_begin, p.q_end), slice(p.kv_begin, p.kv_end))
        for rows, spans_of, n in (
            (made.q_rows, p.q_spans, cu_q[-1]),
            (made.kv_rows, p.kv_spans, cu_kv[-1]),
        ):
            inside = [i for s, e in spans_of.tolist() for i in range(s, e)]
            assert inside == (list(range(n)) if rows is None else rows.tolist())


def test_a_star_takes_two_dense_passes() -> None:
    plan = make_attention_plan(pack_trees([PrefixTree.from_group(10, [4] * 8)]))
    causal, cross = plan.passes
    assert [b.num_spans for b in span_batches(causal)] == [1, 8]
    assert (cross.q_begin, cross.q_end, cross.kv_begin, cross.kv_end) == (10, 42, 0, 10)
    _, made = TorchFlashBackend().prepare(plan, torch.device("cpu")).passes
    assert made.q_rows is None and made.kv_rows is None
    assert made.arguments.cu_seqlens_q.tolist() == [0, 32]
    assert made.arguments.cu_seqlens_kv.tolist() == [0, 10]


def test_gaps_between_trees_become_empty_sequences() -> None:
    plan = make_attention_plan(pack_trees([PrefixTree.from_group(2, [2, 1])] * 2))
    args = VarlenArguments.of(plan.passes[1], torch.device("cpu"))
    assert args.cu_seqlens_q.tolist() == [0, 3, 5, 5, 8]
    assert args.cu_seqlens_kv.tolist() == [0, 2, 2, 5, 7]


@settings(max_examples=100)
@given(forests(), st.sampled_from([0, 1, 2, 5]))
def test_a_window_is_one_pass_over_runs_and_their_contexts(
    forest: tuple[PackedLayout, list[list[int]]], window: int
) -> None:
    layout, _ = forest
    plan = make_attention_plan(layout, window)
    assert plan.window == (window if window < layout.max_position else None)
    windowed = make_windowed_pass(layout, window)
    (gather,) = windowed.gathers
    assert gather.prefix_row is None and (gather.places == np.arange(len(gather.rows))).all()
    assert windowed.q_spans.ravel()[[0, -1]].tolist() == [0, layout.unique_tokens]
    assert (windowed.q_spans[1:, 0] == windowed.q_spans[:-1, 1]).all(), "runs tile the row"
    assert (windowed.kv_spans[1:, 0] == windowed.kv_spans[:-1, 1]).all()
    count = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.int64)
    for (start, end), (kv_start, kv_end) in zip(
        windowed.q_spans.tolist(), windowed.kv_spans.tolist()
    ):
        keys = gather.rows[kv_start:kv_end]
        assert keys[-(end - start) :].tolist() == list(range(start, end)), "a run's keys end in it"
        for query in range(start, end):
            last = kv_end - kv_start - (end - 1 - query)
            count[query, keys[max(last - 1 - window, 0) : last]] += 1
    visible = dense_mask(layout, window).to(torch.int64)
    visible[layout.unique_tokens :] = 0
    assert torch.equal(count, visible)
    assert windowed.attention_pairs == int(visible.sum())


def test_the_runs_of_the_readme_are_what_is_computed() -> None:
    samples = ["AAAABB", "AAAACCCDD", "AAAACCCE"]
    layout = pack_trees([PrefixTree.from_sequences([list(map(ord, s)) for s in samples])])
    names = "".join(map(chr, layout.token_ids.tolist()))
    windowed = make_windowed_pass(layout, 3)
    runs = [" ".join(names[a:b]) for a, b in windowed.q_spans.tolist()]
    drawn = (ROOT / "megatron_pg" / "attention" / "README.md").read_text()
    assert f"runs:      {' | '.join(runs)}\n" in drawn
    lens = np.diff(windowed.q_spans)[:, 0].tolist()
    for number, word in ((1, "second"), (2, "third")):
        start, end = windowed.kv_spans[number]
        keys = [names[row] for row in windowed.gathers[0].rows[start:end]]
        context, own = " ".join(keys[: -lens[number]]), " ".join(keys[-lens[number] :])
        (line,) = (line for line in drawn.splitlines() if f"keys of the {word}:" in line)
        assert line.split(":")[-1].strip() == f"{context}, {own}"


@pytest.mark.parametrize(
    ("lens", "window", "num_keys", "pairs"),
    [((1024, [512] * 8), 128, 6_016, 652_224), ((4096, [1024] * 16), 1024, 35_840, 20_467_200)],
)
def test_what_a_window_copies_and_computes(lens, window, num_keys, pairs) -> None:
    """A context for every response but the first, which continues the prompt's run."""
    layout = pack_trees([PrefixTree.from_group(*lens)])
    windowed = make_windowed_pass(layout, window)
    num_runs = len(lens[1])
    assert len(windowed.q_spans) == num_runs
    assert windowed.kv_end == num_keys == layout.unique_tokens + (num_runs - 1) * window
    reached = layout.position_ids.clamp(max=window) + 1
    assert windowed.attention_pairs == pairs == int(reached.sum())


def test_what_forks_nowhere_takes_one_pass() -> None:
    """One sample of a group, and turns of a conversation that extend each other."""
    conversation = PrefixTree(np.array([4, 2, 3]), np.array([-1, 0, 1]), np.array([1, 2]))
    layout = pack_trees([PrefixTree.from_group(5, [7]), conversation])
    (causal,) = make_attention_plan(layout).passes
    assert causal.q_spans.tolist() == [[0, 12], [12, 21]]


def test_the_figure_of_the_readme_is_what_is_computed() -> None:
    samples = ["AAAABB", "AAAACCCDD", "AAAACCCE"]
    layout = pack_trees([PrefixTree.from_sequences([list(map(ord, s)) for s in samples])])
    figure = [[" "] * layout.total_tokens for _ in range(layout.total_tokens)]
    for number, p in enumerate(make_attention_plan(layout).passes):
        for (q_start, q_end), (kv_start, kv_end) in zip(p.q_spans.tolist(), p.kv_spans.tolist()):
            for i in range(q_end - q_start):
                for j in range(min(i + 1, kv_end - kv_start) if p.causal else kv_end - kv_start):
                    row = figure[p.q_begin + q_start + i]
                    row[p.kv_begin + kv_start + j] = str(number)
    drawn = (ROOT / "megatron_pg" / "attention" / "README.md").read_text().splitlines()
    names = "".join(map(chr, layout.token_ids.tolist()))
    first = next(i for i, line in enumerate(drawn) if line.startswith("  queries"))
    for line, name, cells in zip(drawn[first:], names, figure, strict=False):
        assert line[11:].split("0, 1, 2:")[0].split("blank:")[0].rstrip() == (
            f"{name}         {' '.join(cells)}".rstrip()
        )
    assert len(figure) == 12 and names == "AAAABBCCCDDE"
