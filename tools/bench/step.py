"""A training step: forward, backward, clipping and optimizer, on one rank, tp=2 and pp=2."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tools.bench.gpt import Dims, make_dims, make_work, megatron
from tools.bench.ranks import on_two_ranks
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, flop_bound, select, standard_shapes, star
from tools.bench.timing import time_interleaved
from tools.bench.training import Trainer
from tools.flops import FORWARD_BACKWARD


@register("step")
def step(options: Options) -> Iterator[BenchmarkRow]:
    """A GPT of 4 layers; the bound weighs tokens, pairs and predictions by FLOPs.

    Baseline: the same model, kernels, schedule and optimizer on the samples written out, packed
    without padding. Parallel ranks are processes of this machine with one thread each; a pipeline
    gets one microbatch a stage. The shape with one response has nothing to share. Peaks of memory
    are measured by ``memory``.
    """
    lone = star(32, 8, 1) if options.quick else star(1024, 1024, 1)
    shapes = standard_shapes(options) + [lone] * select(lone, options)
    if 1 in options.ranks:
        dims = make_dims(options)
        with megatron(dims):
            trainer = Trainer(dims, options.dtype)
            for shape in shapes:
                yield _compare(shape, dims, options, trainer)
    if 2 in options.ranks and not torch.cuda.is_available():
        stars = shapes[:1] if options.quick else [s for s in shapes if s.tree.depth == 1]
        for layout in (dict(tp=2), dict(pp=2)):
            yield from on_two_ranks(partial(_on_ranks, stars, layout), options)


def _compare(shape: Shape, dims: Dims, options: Options, trainer: Trainer) -> BenchmarkRow:
    works = [make_work(shape, dims, options.device, seed) for seed in range(dims.pp)]
    batches = {name: [work[name] for work in works] for name in works[0]}
    gradients = {name: partial(trainer.forward_backward, batch) for name, batch in batches.items()}
    error = trainer.check_equal(gradients, "written out")
    # The first step makes the optimizer's state: it is not timed, forward and backward have run.
    trainer.optimizer.step()
    paths = {name: partial(trainer.step, batch) for name, batch in batches.items()}
    times = time_interleaved(paths, options.num_rounds(5), options.clock)
    return BenchmarkRow(
        benchmark="step",
        shape=shape.describe(**dims.describe(), microbatches=dims.pp, dtype=str(options.dtype)),
        baseline="written out",
        bound=flop_bound(shape, dims.cost_model, FORWARD_BACKWARD),
        max_error=error,
        **times.against("written out"),
    )


def _on_ranks(shapes: list[Shape], layout: dict[str, int], options: Options) -> list[BenchmarkRow]:
    dims = make_dims(options, **layout)
    with megatron(dims):
        trainer = Trainer(dims, options.dtype)
        return [_compare(shape, dims, options, trainer) for shape in shapes]
