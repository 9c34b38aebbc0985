"""A training step on ordinary rows by the model that finds itself what they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_pg import PrefixTree
from megatron_pg.mcore import (
    PrefixGroupedSeqParams,
    PrefixSharingGPTModel,
    SharedTokens,
    count_shared_tokens,
)
from tools.bench.gpt import Dims
from tools.bench.ranks import Comparison, parallel_dims, run_comparisons
from tools.bench.registry import BenchmarkMismatch, BenchmarkRow, Options, register
from tools.bench.shapes import Shape, select, standard_shapes
from tools.bench.timing import time_interleaved
from tools.bench.training import Trainer
from tools.flops import FlopWeights, packed_flops, written_out_flops

# As FORWARD_BACKWARD, but logits are kept: their backward is two products, not three.
WEIGHTS = FlopWeights(3, 3.5, 3)


@register("transparent")
def transparent(options: Options) -> Iterator[BenchmarkRow]:
    """A step of the GPT of ``step`` on a ``thd`` row with labels, every token's loss weighted.

    Ours finds the shared runs, packs, and writes the logits out again; the bound weighs tokens,
    pairs and logits by FLOPs. Baseline: the same model on the written-out row, told that nothing
    is shared. Where samples share nothing the ratio is what looking for it costs, and its bound 1.
    """
    nothing = _nothing_shared(options)
    shapes = [*standard_shapes(options), *[nothing] * select(nothing, options)]
    some = [shapes[0], *[nothing] * select(nothing, options)]
    yield from run_comparisons(
        (
            Comparison(f"transparent {shape.name}", dims, tokens, partial(_compare, shape, dims))
            for dims in parallel_dims("transparent", options)
            for shape in (some if dims.tp * dims.pp > 1 else shapes)
            for tokens in [shape.tree.logical_tokens]
        ),
        options,
    )


def _nothing_shared(options: Options) -> Shape:
    count, length = (4, 40) if options.quick else (8, 1152)
    tree = PrefixTree(np.full(count, length), np.full(count, -1), np.arange(count))
    return Shape(tree, {"name": f"{count} x {length}, nothing shared", "num_generations": 1})


def _compare(shape: Shape, dims: Dims, options: Options) -> BenchmarkRow:
    trainer = Trainer(dims, options.dtype, PrefixSharingGPTModel)
    model = trainer.model.module
    model.min_shared = 8 if options.quick else PrefixSharingGPTModel.min_shared
    works = [_make_work(shape, dims, options.device, seed) for seed in range(dims.pp)]
    batches = {name: [work[name] for work in works] for name in works[0]}
    gradients = {name: partial(trainer.forward_backward, batch) for name, batch in batches.items()}
    before = count_shared_tokens(model)
    error = trainer.check_equal(gradients, "written out")
    after = count_shared_tokens(model)
    found = SharedTokens(after.unique - before.unique, after.logical - before.logical)
    if found != (dims.pp * shape.tree.unique_tokens, dims.pp * shape.tree.logical_tokens):
        raise BenchmarkMismatch(
            f"{shape.name}: {found} in {dims.pp} row(s); no speed-up is reported"
        )
    trainer.optimizer.step()
    paths = {name: partial(trainer.step, batch) for name, batch in batches.items()}
    times = time_interleaved(paths, options.num_rounds(5), options.clock)
    tree, cost = shape.tree, dims.cost_model
    return BenchmarkRow(
        benchmark="transparent",
        shape=shape.describe(**dims.describe(), microbatches=dims.pp, dtype=str(options.dtype)),
        baseline="written out",
        bound=written_out_flops(tree, tree.logical_tokens, cost, WEIGHTS)
        / packed_flops(tree, tree.unique_tokens, cost, WEIGHTS),
        max_error=error,
        **times.against("written out"),
    )


@dataclass(frozen=True, eq=False)
class RowWork:
    """One microbatch: a written-out row, told what it shares or not."""

    tokens: Tensor
    positions: Tensor
    params: Any
    labels: Tensor
    weights: Tensor

    @property
    def num_predictions(self) -> int:
        """The row is as long, shared or not."""
        return len(self.labels)

    def forward(self, model: Any) -> Any:
        """What the model returns: the loss of every token on the last stage."""
        return model(
            self.tokens[None],
            self.positions[None],
            None,
            labels=self.labels[None],
            packed_seq_params=self.params,
        )

    def loss(self, output: Tensor) -> Tensor:
        """Weighted sum of the tokens' losses."""
        return (output * self.weights).sum()


def _make_work(shape: Shape, dims: Dims, device: torch.device, seed: int) -> dict[str, RowWork]:
    """Random tokens of ``shape``, found to be shared ("ours") and "written out"."""
    g = torch.Generator().manual_seed(seed)
    tree, total = shape.tree, shape.tree.logical_tokens
    tokens = torch.randint(0, dims.vocab_size, (tree.unique_tokens,), generator=g)
    labels = torch.randint(0, dims.vocab_size, (total,), generator=g).to(device)
    weights = (torch.rand(total, generator=g) + 0.5).to(device)
    bounds = torch.from_numpy(np.cumsum([0, *tree.sample_lens])).int()
    longest = int(tree.sample_lens.max())
    told = PrefixGroupedSeqParams.from_layout(shape.written_out, device)
    thd = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    row = shape.packed.expand(tokens)
    rest = told.position_ids, labels, weights
    return {
        "ours": RowWork(row, rest[0], thd, *rest[1:]),
        "written out": RowWork(row.to(device), rest[0], told, *rest[1:]),
    }
