"""One layer of linear attention, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_pg import PackedLayout
from megatron_pg.mcore import (
    PrefixGroupedSeqParams,
    with_local_linear_layers,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)
from tools.bench.gpt import make_config, make_dims, megatron
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, standard_shapes
from tools.bench.timing import check_equal, peak_bytes, time_interleaved

# Heads of keys and of values, and their sizes: those of Qwen3-Next on a GPU, a quarter of the
# benchmarks' model on a CPU.
GPU, CPU, TINY = (16, 32, 128), (4, 8, 64), (2, 4, 8)


@register("linear")
def linear(options: Options) -> Iterator[BenchmarkRow]:
    """A Gated DeltaNet layer; every token costs the same, so the bound is that of tokens.

    Baseline: the same layer on the samples written out side by side, each from its own state.
    """
    for shape in standard_shapes(options):
        yield _compare(shape, options)


def _compare(shape: Shape, options: Options) -> BenchmarkRow:
    keys, values, dim = TINY if options.quick else GPU if options.device.type == "cuda" else CPU
    dims = make_dims(options, num_layers=1)
    with megatron(dims):
        config = replace(
            make_config(dims, options.dtype),
            experimental_attention_variant="gated_delta_net",
            linear_attention_freq=[1],
            linear_num_key_heads=keys,
            linear_num_value_heads=values,
            linear_key_head_dim=dim,
            linear_value_head_dim=dim,
        )
        layer = _build(config).to(options.device)
        generator = torch.Generator().manual_seed(0)
        dout, hidden = (
            torch.randn(n, 1, dims.hidden_size, generator=generator).to(
                options.device, options.dtype
            )
            for n in (shape.tree.logical_tokens, shape.tree.unique_tokens)
        )
        paths = {
            "ours": _path(layer, shape.packed, hidden, shape.packed.reduce(dout)),
            "written out": _path(layer, shape.written_out, shape.packed.expand(hidden), dout),
        }
        out, dhidden, *dweights = paths["ours"]()
        want, want_dhidden, *want_dweights = paths["written out"]()
        pairs = [
            ("output", shape.packed.expand(out), want),
            ("input gradient", dhidden, shape.packed.reduce(want_dhidden)),
            *((f"gradient {i}", *pair) for i, pair in enumerate(zip(dweights, want_dweights))),
        ]
        error = check_equal(pairs, 1e-4 if options.dtype == torch.float32 else 5e-2)
        times = time_interleaved(paths, options.num_rounds(5), options.clock)
        peaks = {name: peak_bytes(run) for name, run in paths.items()}
    return BenchmarkRow(
        benchmark="linear",
        shape=shape.describe(
            hidden=dims.hidden_size,
            key_heads=keys,
            value_heads=values,
            head_dim=dim,
            dtype=str(options.dtype),
        ),
        baseline="written out",
        bound=shape.token_ratio,
        max_error=error,
        ours_peak_bytes=peaks["ours"],
        baseline_peak_bytes=peaks["written out"],
        **times.against("written out"),
    )


def _build(config: Any) -> torch.nn.Module:
    block = with_sequence_parallel_norms(get_gpt_layer_local_spec(normalization="RMSNorm"), config)
    wrapped: Any = with_prefix_grouped_attention(with_local_linear_layers(block, config))
    layer: Any = build_module(
        wrapped.layer_specs[0].submodules.self_attention,
        config=config,
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    with torch.no_grad():
        # As they begin, states are forgotten within a token, and gradients of decays are rounding.
        layer.A_log.uniform_(-5.0, 0.5)
        layer.dt_bias.uniform_(-2.0, 1.0)
    built: torch.nn.Module = layer
    return built


def _path(
    layer: torch.nn.Module, layout: PackedLayout, hidden: Tensor, dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A run that returns the output, and gradients of the input and of every weight."""
    params = PrefixGroupedSeqParams.from_layout(layout, hidden.device)
    weights = list(layer.parameters())

    def run() -> tuple[Tensor, ...]:
        leaf = hidden.detach().requires_grad_()
        out = layer(leaf, None, packed_seq_params=params)[0]
        return out.detach(), *torch.autograd.grad(out, [leaf, *weights], dout)

    return run
