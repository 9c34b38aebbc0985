"""Planning on the host: trees, balancing over data-parallel ranks, rows and their layouts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_pg import PackedLayout, PrefixTree, balance_groups, pack_trees
from megatron_pg.attention import make_attention_plan
from megatron_pg.data import GroupShape, equalize_num_microbatches, plan_rows
from tools.bench.registry import BenchmarkMismatch, BenchmarkRow, Options, register
from tools.bench.timing import time_interleaved

DP_SIZE, MAX_TOKENS, NUM_GENERATIONS = 8, 16384, 16
Lens = list[tuple[int, list[int]]]


@register("layout")
def layout(options: Options) -> list[BenchmarkRow]:
    """Trees from lengths, and every array of a layout that training reads."""
    return _growth("layout", options, _lay_out)


@register("pack")
def pack(options: Options) -> list[BenchmarkRow]:
    """Trees, balancing over 8 data-parallel ranks, rows of equal number, and their layouts."""
    return _growth("pack", options, _plan_and_lay_out)


def _growth(benchmark: str, options: Options, run: Callable[[Lens], int]) -> list[BenchmarkRow]:
    """Rows for 4 sizes; ratio is groups per second relative to the smallest size, bound is 1."""
    sizes = (8, 16, 32, 64) if options.quick else (512, 1024, 2048, 4096)
    lens = {n: _random_lens(n) for n in sizes}
    for n in sizes:
        laid_out, want = run(lens[n]), sum(p + sum(r) for p, r in lens[n])
        if laid_out != want:
            raise BenchmarkMismatch(f"{n} groups have {want} unique tokens, {laid_out} laid out")
    names = {n: "ours" if n == sizes[0] else str(n) for n in sizes}
    paths = {names[n]: lambda n=n: run(lens[n]) for n in sizes}
    times = time_interleaved(paths, options.num_rounds(5), options.clock)
    rows = []
    for n in sizes:
        fields = times.against("ours", ours=names[n])
        low, high = fields.pop("ratio_spread")
        scale = n / sizes[0]
        fields["ratio"] *= scale
        rows.append(
            BenchmarkRow(
                benchmark=benchmark,
                shape=dict(name=f"{n} groups", groups=n, num_generations=NUM_GENERATIONS),
                baseline=f"{sizes[0]} groups, per group",
                bound=1.0,
                ratio_spread=(low * scale, high * scale),
                **fields,
            )
        )
    return rows


def _random_lens(num_groups: int) -> Lens:
    random = np.random.default_rng(num_groups)
    prompts = random.integers(64, 512, num_groups).tolist()
    responses = random.integers(16, 512, (num_groups, NUM_GENERATIONS)).tolist()
    return list(zip(prompts, responses))


def _shapes(lens: Lens) -> list[GroupShape]:
    return [
        GroupShape(str(i), PrefixTree.from_group(p, r), np.array(r))
        for i, (p, r) in enumerate(lens)
    ]


def _lay_out(lens: Lens) -> int:
    trees = [PrefixTree.from_group(p, r) for p, r in lens]
    return sum(_read(pack_trees(trees[i : i + 4])) for i in range(0, len(trees), 4))


def _plan_and_lay_out(lens: Lens) -> int:
    shapes = _shapes(lens)
    members = balance_groups(shapes, DP_SIZE)
    plans = [plan_rows(shapes, MAX_TOKENS, members=m) for m in members]
    laid_out = 0
    for plan in equalize_num_microbatches(plans):
        laid_out += sum(_read(plan.row_layout(i)) for i, row in enumerate(plan.rows) if row)
    return laid_out


def _read(layout: PackedLayout) -> int:
    """Make what a microbatch needs of its layout; number of tokens that are no padding."""
    passes = make_attention_plan(layout).passes
    assert passes and len(layout.position_ids) == len(layout.predictor_of) == layout.total_tokens
    return layout.unique_tokens
