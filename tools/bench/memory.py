"""Peak activation memory of forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tools.bench.gpt import make_dims, make_work, megatron
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, standard_shapes
from tools.bench.timing import check_equal, peak_bytes
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
            yield _compare(shape, trainer, options)


def _compare(shape: Shape, trainer: Trainer, options: Options) -> BenchmarkRow:
    dims = make_dims(options, chunk_tokens=64)
    work = make_work(shape, dims, options.device)
    losses = {name: torch.tensor(trainer.forward_backward([w])) for name, w in work.items()}
    bound = 1e-5 if options.dtype == torch.float32 else 2e-2
    error = check_equal([("loss", losses["ours"], losses["written out"])], bound)
    peaks = {name: peak_bytes(partial(trainer.forward_backward, [w])) for name, w in work.items()}
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
