"""What is run: trees, the same samples written out, and the ratios that arithmetic allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.data import CostModel
from megatron_pg.tree import IntArray
from tools.bench.registry import Options
from tools.flops import FlopWeights, packed_flops, written_out_flops


@dataclass(frozen=True, eq=False)
class Shape:
    """One tree, packed and written out.

    ``packed.expand(x)`` are the rows of ``written_out`` in order, which is how inputs are copied
    from one to the other and how results are compared.
    """

    tree: PrefixTree
    fields: dict[str, Any]

    @cached_property
    def packed(self) -> PackedLayout:
        return pack_trees([self.tree])

    @cached_property
    def written_out(self) -> PackedLayout:
        """One tree a sample: the same kernels, no padding, nothing shared."""
        return _written_out(self.tree.sample_lens)

    def written_out_rows(self, max_tokens: int | None) -> list[PackedLayout]:
        """The same in rows of at most ``max_tokens``, samples in order; one row when None.

        A sample that is longer has a row of its own.
        """
        rows: list[list[int]] = []
        for length in self.tree.sample_lens.tolist():
            if not rows or (max_tokens is not None and sum(rows[-1]) + length > max_tokens):
                rows.append([])
            rows[-1].append(length)
        return [_written_out(row) for row in rows]

    def longest_row(self, max_tokens: int | None) -> int:
        """Tokens of the longest row of either path, written out as ``written_out_rows`` does."""
        rows = [self.packed, *self.written_out_rows(max_tokens)]
        return max(row.total_tokens for row in rows)

    @property
    def name(self) -> str:
        return str(self.fields["name"])

    @property
    def token_ratio(self) -> float:
        return self.tree.logical_tokens / self.tree.unique_tokens

    @property
    def pair_ratio(self) -> float:
        return self.tree.logical_attention_pairs / self.tree.attention_pairs

    def describe(self, **more: Any) -> dict[str, Any]:
        """The ``shape`` field of a row."""
        tree = self.tree
        sizes = dict(unique_tokens=tree.unique_tokens, logical_tokens=tree.logical_tokens)
        return {**self.fields, "depth": tree.depth, **sizes, **more}


def star(prefix_len: int, suffix_len: int, num_generations: int) -> Shape:
    """One prompt, responses of one length."""
    tree = PrefixTree.from_group(prefix_len, [suffix_len] * num_generations)
    return Shape(tree, _star_fields(prefix_len, suffix_len, num_generations, ""))


def ragged_star(prefix_len: int, suffix_len: int, num_generations: int) -> Shape:
    """One prompt, responses of ``suffix_len`` on average, each of another length."""
    middle = (num_generations - 1) / 2
    spread = suffix_len // (2 * num_generations)
    lens = [suffix_len + int(2 * spread * (i - middle)) for i in range(num_generations)]
    lens = [lens[3 * i % len(lens)] for i in range(len(lens))] if len(lens) % 3 else lens
    tree = PrefixTree.from_group(prefix_len, lens)
    return Shape(tree, _star_fields(prefix_len, suffix_len, num_generations, " ragged"))


def two_level(stem: int, branch: int, leaf: int, branches: int, leaves: int) -> Shape:
    """A stem, branches on it and leaves on each branch."""
    lens, parents, ends = [stem], [-1], []
    for _ in range(branches):
        parents += [0] + [len(lens)] * leaves
        ends += list(range(len(lens) + 1, len(lens) + 1 + leaves))
        lens += [branch] + [leaf] * leaves
    tree = PrefixTree(np.array(lens), np.array(parents), np.array(ends))
    name = f"tree {stem}+{branches}x{branch}+{branches * leaves}x{leaf}"
    return Shape(tree, {"name": name, "num_generations": branches * leaves})


def standard_shapes(options: Options) -> list[Shape]:
    """Shapes that attention and steps are measured at, and those of the plots when asked for."""
    if options.quick:
        shapes = [star(32, 8, 4), ragged_star(32, 8, 4), two_level(16, 8, 4, 2, 2)]
    elif options.device.type == "cuda":
        shapes = [
            star(2048, 512, 8),
            star(1024, 1024, 8),
            star(4096, 512, 16),
            ragged_star(2048, 512, 8),
            two_level(2048, 512, 512, 4, 4),
        ]
    else:
        shapes = [
            star(1024, 128, 8),
            star(2048, 128, 16),
            star(1024, 1024, 8),
            star(4096, 512, 8),
            star(512, 64, 32),
            ragged_star(1024, 128, 8),
            two_level(1024, 256, 128, 4, 4),
        ]
    shapes += sweep_shapes(options.quick) * options.sweep
    return [s for s in shapes if select(s, options)]


def sweep_shapes(quick: bool) -> list[Shape]:
    """One length varied at a time: prefix, response, group size, depth."""
    factors, depths = ((1, 2), (1, 2)) if quick else ((1, 2, 4, 8, 16), (1, 2, 3))
    prefix_len, suffix_len, num_generations = (16, 4, 2) if quick else (256, 64, 2)
    middle = factors[len(factors) // 2]
    base = dict(
        prefix_len=middle * prefix_len,
        suffix_len=middle * suffix_len,
        num_generations=4 if quick else 8,
    )
    shapes = []
    for name, smallest in (
        ("prefix_len", prefix_len),
        ("suffix_len", suffix_len),
        ("num_generations", num_generations),
    ):
        for factor in factors:
            shape = star(**{**base, name: smallest * factor})
            shapes.append(Shape(shape.tree, {**shape.fields, "sweep": name}))
    return shapes + [binary_tree(base["prefix_len"], depth) for depth in depths]


def binary_tree(segment_len: int, depth: int) -> Shape:
    """A tree whose segments are equally long and have two children each."""
    lens: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    stack = [(-1, 0)]
    while stack:
        parent, level = stack.pop()
        index = len(lens)
        lens.append(segment_len)
        parents.append(parent)
        if level == depth:
            ends.append(index)
        else:
            stack += [(index, level + 1)] * 2
    tree = PrefixTree(np.array(lens), np.array(parents), np.array(ends))
    return Shape(tree, {"name": f"binary {depth}x{segment_len}", "sweep": "depth"})


def select(shape: Shape, options: Options) -> bool:
    """Whether the options ask for this shape."""
    return not options.shapes or any(part in shape.name for part in options.shapes)


def flop_bound(shape: Shape, cost: CostModel, weights: FlopWeights) -> float:
    """FLOPs written out over FLOPs packed: tokens, attention pairs and predictions together."""
    tree = shape.tree
    logical_trained = _trained(tree) * tree.segment_multiplicity
    logical = written_out_flops(tree, float(logical_trained.sum()), cost, weights)
    return logical / shape_flops(shape, cost, weights)


def shape_flops(shape: Shape, cost: CostModel, weights: FlopWeights) -> float:
    """FLOPs packed; every token below a root is predicted."""
    return packed_flops(shape.tree, float(_trained(shape.tree).sum()), cost, weights)


def _trained(tree: PrefixTree) -> IntArray:
    """Predicted tokens of every segment."""
    trained: IntArray = tree.segment_lens * (tree.segment_parents >= 0)
    return trained


def _star_fields(
    prefix_len: int, suffix_len: int, num_generations: int, suffix: str
) -> dict[str, Any]:
    return {
        "name": f"P{prefix_len} R{suffix_len} G{num_generations}{suffix}",
        "prefix_len": prefix_len,
        "suffix_len": suffix_len,
        "num_generations": num_generations,
    }


def _written_out(lens: Iterable[int]) -> PackedLayout:
    return pack_trees([PrefixTree(np.array([n]), np.array([-1]), np.array([0])) for n in lens])
