"""One transformer layer, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron_pg.mcore import PrefixGroupedGPTModel
from tools.bench.gpt import Work, build_model, make_config, make_dims, make_work, megatron
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, flop_bound, standard_shapes
from tools.bench.timing import check_equal, peak_bytes, time_interleaved
from tools.flops import FORWARD_BACKWARD


@register("layer")
def layer(options: Options) -> Iterator[BenchmarkRow]:
    """A layer of the benchmarks' model; the bound weighs tokens and attention pairs by FLOPs.

    Baseline: the same layer on the samples written out, packed without padding.
    """
    for shape in standard_shapes(options):
        yield _compare(shape, options)


def _compare(shape: Shape, options: Options) -> BenchmarkRow:
    dims = make_dims(options, num_layers=1)
    with megatron(dims):
        model = build_model(dims, make_config(dims, options.dtype), whole=False)
        work = make_work(shape, dims, options.device)
        generator = torch.Generator().manual_seed(0)
        size = (2, shape.tree.logical_tokens, 1, dims.hidden_size)
        dout = torch.randn(size[1:], generator=generator).to(options.device, options.dtype)
        hidden = torch.randn(shape.tree.unique_tokens, *size[2:], generator=generator)
        hidden = hidden.to(options.device, options.dtype)
        paths = {
            "ours": _path(model, work["ours"], hidden, shape.packed.reduce(dout)),
            "written out": _path(model, work["written out"], shape.packed.expand(hidden), dout),
        }
        (out, dhidden, *dweights), (want, want_dhidden, *want_dweights) = (
            run() for run in paths.values()
        )
        error = check_equal(
            [
                ("hidden states", shape.packed.expand(out), want),
                ("input gradient", dhidden, shape.packed.reduce(want_dhidden)),
                *((f"gradient {i}", *pair) for i, pair in enumerate(zip(dweights, want_dweights))),
            ],
            1e-4 if options.dtype == torch.float32 else 5e-2,
        )
        del out, dhidden, dweights, want, want_dhidden, want_dweights
        times = time_interleaved(paths, options.num_rounds(5), options.clock)
        peaks = {name: peak_bytes(run) for name, run in paths.items()}
    return BenchmarkRow(
        benchmark="layer",
        shape=shape.describe(**dims.describe(), dtype=str(options.dtype)),
        baseline="written out",
        bound=flop_bound(shape, dims.cost_model, replace(FORWARD_BACKWARD, per_loss_token=0)),
        max_error=error,
        ours_peak_bytes=peaks["ours"],
        baseline_peak_bytes=peaks["written out"],
        **times.against("written out"),
    )


def _path(
    model: PrefixGroupedGPTModel, work: Work, hidden: Tensor, dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    weights = list(model.parameters())

    def run() -> tuple[Tensor, ...]:
        leaf = hidden.detach().requires_grad_()
        model.set_input_tensor(leaf)
        out = work.forward(model)
        return out.detach(), *torch.autograd.grad(out, [leaf, *weights], dout)

    return run
