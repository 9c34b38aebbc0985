"""Peak activation memory of forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tools.bench.gpt import make_dims, make_work, megatron
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.room import has_room
from tools.bench.shapes import Shape, standard_shapes
from tools.bench.timing import peak_bytes
from tools.bench.training import Trainer


@register("memory")
def memory(options: Options) -> Iterator[BenchmarkRow]:
    """What forward and backward allocate beside weights, gradients and optimizer state.

    The bound is logical over unique tokens. Baseline: the same model on the samples written out.
    """
    dims = make_dims(options, chunk_tokens=64)
    with megatron(dims):
        trainer = Trainer(dims, options.dtype)
        for shape in standard_shapes(options):
            if has_room(f"memory {shape.name}", dims, shape.tree.logical_tokens, options):
                yield _compare(shape, trainer, options)


def _compare(shape: Shape, trainer: Trainer, options: Options) -> BenchmarkRow:
    dims = make_dims(options, chunk_tokens=64)
    work = make_work(shape, dims, options.device)
    paths = {name: partial(trainer.forward_backward, [w]) for name, w in work.items()}
    error = trainer.check_equal(paths, "written out")
    peaks = {name: peak_bytes(run) for name, run in paths.items()}
    return BenchmarkRow(
        benchmark="memory",
        shape=shape.describe(**dims.describe(), dtype=str(options.dtype)),
        baseline="written out",
        ratio=peaks["written out"] / peaks["ours"],
        bound=shape.token_ratio,
        ours_peak_bytes=peaks["ours"],
        baseline_peak_bytes=peaks["written out"],
        max_error=error,
    )
