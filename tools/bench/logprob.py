"""Logprobs of the current policy: a forward pass without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tools.bench.gpt import (
    Work,
    build_model,
    make_config,
    make_dims,
    make_work,
    megatron,
    per_sample_token,
)
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, flop_bound, standard_shapes
from tools.bench.timing import check_equal, peak_bytes, time_interleaved
from tools.flops import FORWARD


@register("logprob")
def logprob(options: Options) -> Iterator[BenchmarkRow]:
    """The whole model, forward only; the bound weighs tokens, pairs and predictions by FLOPs.

    Baseline: the same model on the samples written out, packed without padding.
    """
    for shape in standard_shapes(options):
        yield _compare(shape, options)


def _compare(shape: Shape, options: Options) -> BenchmarkRow:
    dims = make_dims(options)
    with megatron(dims):
        model = build_model(dims, make_config(dims, options.dtype))
        work = make_work(shape, dims, options.device)
        paths = {name: partial(_logprobs, model, w) for name, w in work.items()}
        got = per_sample_token(shape, work["ours"], paths["ours"]())
        bound = 1e-5 if options.dtype == torch.float32 else 2e-2
        error = check_equal([("logprobs", got, paths["written out"]())], bound)
        times = time_interleaved(paths, options.num_rounds(5), options.clock)
        peaks = {name: peak_bytes(run) for name, run in paths.items()}
    return BenchmarkRow(
        benchmark="logprob",
        shape=shape.describe(**dims.describe(), dtype=str(options.dtype)),
        baseline="written out",
        bound=flop_bound(shape, dims.cost_model, FORWARD),
        max_error=error,
        ours_peak_bytes=peaks["ours"],
        baseline_peak_bytes=peaks["written out"],
        **times.against("written out"),
    )


@torch.no_grad()
def _logprobs(model: torch.nn.Module, work: Work) -> Tensor:
    logprobs: Tensor = work.forward(model)[0]
    return logprobs
