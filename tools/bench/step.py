"""A training step: forward, backward, clipping and optimizer, on one rank, tp=2, pp=2 and cp=N."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tools.bench.gpt import Dims, make_microbatches
from tools.bench.ranks import Comparison, parallel_dims, run_comparisons
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, flop_bound, select, shape_flops, standard_shapes, star
from tools.bench.timing import peak_bytes, time_interleaved
from tools.bench.training import Trainer
from tools.flops import FORWARD_BACKWARD


@register("step")
def step(options: Options) -> Iterator[BenchmarkRow]:
    """A GPT of 4 layers; the bound weighs tokens, pairs and predictions by FLOPs.

    Baseline: the same model, kernels, schedule and optimizer on the samples written out, packed
    without padding, on a GPU in rows of ``max_row_tokens`` whose gradients add up. Parallel ranks
    are processes of this machine with one thread each; a pipeline gets one microbatch a stage. The
    shape with one response has nothing to share. ``reachable`` counts the optimizer, timed alone.
    """
    lone = star(32, 8, 1) if options.quick else star(1024, 1024, 1)
    shapes = standard_shapes(options) + [lone] * select(lone, options)
    stars = shapes[:1] if options.quick else [s for s in shapes if s.tree.depth == 1]
    yield from run_comparisons(
        (
            Comparison(f"step {shape.name}", dims, tokens, partial(_compare, shape, dims))
            for dims in parallel_dims("step", options)
            for shape in (stars if dims.num_ranks > 1 else shapes)
            for tokens in [shape.longest_row(options.max_row_tokens)]
        ),
        options,
    )


def _compare(shape: Shape, dims: Dims, options: Options) -> BenchmarkRow:
    trainer = Trainer(dims, options.dtype)
    works = [
        make_microbatches(shape, dims, options.device, seed, options.max_row_tokens)
        for seed in range(dims.pp)
    ]
    batches = {name: [row for work in works for row in work[name]] for name in works[0]}
    gradients = {name: partial(trainer.forward_backward, batch) for name, batch in batches.items()}
    error = trainer.check_equal(gradients, "written out")
    # The first step makes the optimizer's state: it is not timed, forward and backward have run.
    trainer.optimizer.step()
    paths: dict[str, Callable[[], Any]]
    paths = {name: partial(trainer.step, batch) for name, batch in batches.items()}
    rest = {"optimizer": trainer.optimizer.step}
    times = time_interleaved(paths | rest, options.num_rounds(5), options.clock)
    bound = flop_bound(shape, dims.cost_model, FORWARD_BACKWARD)
    peaks: dict[str, int] = {}
    if options.device.type == "cuda":
        # What the allocator counts anyway; ``memory`` measures it on the CPU.
        peaks = {name: peak_bytes(run) for name, run in paths.items()}
    return BenchmarkRow(
        benchmark="step",
        shape=shape.describe(**dims.describe(), microbatches=dims.pp, dtype=str(options.dtype)),
        baseline="written out",
        bound=bound,
        reachable=times.beside(bound, "optimizer"),
        max_error=error,
        ours_flops=dims.pp * shape_flops(shape, dims.cost_model, FORWARD_BACKWARD),
        ours_peak_bytes=peaks.get("ours"),
        baseline_peak_bytes=peaks.get("written out"),
        **times.against("written out"),
    )
