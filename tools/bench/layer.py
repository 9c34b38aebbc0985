"""One transformer layer, forward and backward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_pg.mcore import PrefixGroupedGPTModel
from tools.bench.gpt import (
    Dims,
    Work,
    build_model,
    build_stock_model,
    make_config,
    make_dims,
    make_work,
    megatron,
)
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, flop_bound, standard_shapes
from tools.bench.timing import check_equal, peak_bytes, time_interleaved
from tools.flops import FORWARD_BACKWARD, flops, packed_flops

# Scores, probabilities and their gradients of the stock attention, at most this many bytes.
MAX_STOCK_SCORE_BYTES = 8 * 2**30
# (hidden states [tokens, 1, hidden], gradient of the input, gradients of the weights)
Results = tuple[Tensor, ...]


@register("layer")
def layer(options: Options) -> Iterator[BenchmarkRow]:
    """A layer of the benchmarks' model; the bound weighs tokens and attention pairs by FLOPs.

    Baselines: the same layer on the samples written out, packed without padding; and
    Megatron-Core's local spec on a batch of the samples, padded to the longest, whose bound counts
    the padding and all scores. Its attention holds them, so it is left out where they are too many.
    """
    for shape in standard_shapes(options):
        yield from _compare(shape, options)


def _compare(shape: Shape, options: Options) -> list[BenchmarkRow]:
    dims = make_dims(options, num_layers=1)
    with megatron(dims):
        config = make_config(dims, options.dtype)
        model = build_model(dims, config, whole=False)
        work = make_work(shape, dims, options.device)
        generator = torch.Generator().manual_seed(0)
        size = (2, shape.tree.logical_tokens, 1, dims.hidden_size)
        dout = torch.randn(size[1:], generator=generator).to(options.device, options.dtype)
        hidden = torch.randn(shape.tree.unique_tokens, *size[2:], generator=generator)
        hidden = hidden.to(options.device, options.dtype)
        expanded = shape.packed.expand(hidden)
        paths = {
            "ours": _path(model, work["ours"], hidden, shape.packed.reduce(dout)),
            "written out": _path(model, work["written out"], expanded, dout),
        }
        if options.takes("stock spec") and _fits_stock(shape, dims):
            stock = build_stock_model(dims, config, whole=False)
            stock.load_state_dict(model.state_dict())
            paths["stock spec"] = _stock_path(stock, shape, expanded, dout)
        out, dhidden, *dweights = paths["ours"]()
        error = {}
        for name in list(paths)[1:]:
            want, want_dhidden, *want_dweights = paths[name]()
            error[name] = check_equal(
                [
                    ("hidden states", shape.packed.expand(out), want),
                    ("input gradient", dhidden, shape.packed.reduce(want_dhidden)),
                    *(
                        (f"gradient {i}", *pair)
                        for i, pair in enumerate(zip(dweights, want_dweights))
                    ),
                ],
                1e-4 if options.dtype == torch.float32 else 5e-2,
            )
            del want, want_dhidden, want_dweights
        del out, dhidden, dweights
        times = time_interleaved(paths, options.num_rounds(5), options.clock)
        peaks = {name: peak_bytes(run) for name, run in paths.items()}
    weights = replace(FORWARD_BACKWARD, per_loss_token=0)
    bounds = {
        "written out": flop_bound(shape, dims.cost_model, weights),
        "stock spec": _stock_flops(shape, dims)
        / packed_flops(shape.tree, 0, dims.cost_model, weights),
    }
    return [
        BenchmarkRow(
            benchmark="layer",
            shape=shape.describe(**dims.describe(), dtype=str(options.dtype)),
            baseline=name,
            bound=bounds[name],
            max_error=error[name],
            ours_peak_bytes=peaks["ours"],
            baseline_peak_bytes=peaks[name],
            ours_flops=packed_flops(shape.tree, 0, dims.cost_model, weights),
            **times.against(name),
        )
        for name in error
        if options.takes(name)
    ]


def _path(
    model: PrefixGroupedGPTModel, work: Work, hidden: Tensor, dout: Tensor
) -> Callable[[], Results]:
    weights = list(model.parameters())

    def run() -> Results:
        leaf = hidden.detach().requires_grad_()
        model.set_input_tensor(leaf)
        out = work.forward(model)
        return out.detach(), *torch.autograd.grad(out, [leaf, *weights], dout)

    return run


def _fits_stock(shape: Shape, dims: Dims) -> bool:
    """Whether its scores do: fp32, with what forward and backward make of them six in all."""
    lens = shape.tree.sample_lens
    fits = 6 * 4 * dims.num_heads * len(lens) * max(lens) ** 2 <= MAX_STOCK_SCORE_BYTES
    if not fits:
        print(f"layer: the stock spec's scores are too many at {shape.name}", file=sys.stderr)
    return bool(fits)


def _stock_flops(shape: Shape, dims: Dims) -> float:
    """Forward and backward of the padded batch, its hidden scores computed and kept."""
    num_samples, longest = len(shape.tree.sample_lens), int(max(shape.tree.sample_lens))
    # Scores that were kept are not computed anew: their backward costs twice their forward.
    weights = replace(FORWARD_BACKWARD, per_attention_pair=3)
    return flops(num_samples * longest, num_samples * longest**2, 0, dims.cost_model, weights)


def _stock_path(
    model: GPTModel, shape: Shape, hidden: Tensor, dout: Tensor
) -> Callable[[], Results]:
    """As ``_path``; takes and returns written-out tokens, in between ``[longest, samples]``."""
    weights = list(model.parameters())
    lens = torch.as_tensor(shape.tree.sample_lens)
    longest = int(lens.max())
    # Row of every written-out token in the flattened [longest, samples] batch.
    rows = torch.cat([torch.arange(n) * len(lens) + i for i, n in enumerate(lens.tolist())])
    rows = rows.to(hidden.device)
    is_hidden = torch.ones(longest, longest, dtype=torch.bool, device=hidden.device).triu(1)
    tokens = torch.zeros(len(lens), longest, dtype=torch.long, device=hidden.device)

    def batch(x: Tensor) -> Tensor:
        padded = x.new_zeros(longest * len(lens), x.shape[-1])
        return padded.index_copy(0, rows, x[:, 0]).view(longest, len(lens), -1)

    def unbatch(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, rows).unsqueeze(1)

    batched, batched_dout = batch(hidden), batch(dout)

    def run() -> Results:
        leaf = batched.detach().requires_grad_()
        model.set_input_tensor(leaf)
        out = model(tokens, None, is_hidden[None, None])
        dleaf, *dweights = torch.autograd.grad(out, [leaf, *weights], batched_dout)
        return unbatch(out.detach()), unbatch(dleaf), *dweights

    return run
