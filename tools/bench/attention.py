"""Attention alone, forward and backward, against written-out rows and against a peer."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_pg import PackedLayout, prefix_grouped_attention
from tools.bench.attention_kinds import kind_rows, measured_path, plain_layer
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, standard_shapes
from tools.bench.timing import check_equal, peak_bytes, time_interleaved

# Name of the baseline, and whether its prefix is causal without a mask.
PREFIX_GROUPERS = {"prefix-grouper": False, "prefix-grouper, causal prefix": True}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# (out, dq, dk, dv)
Results = tuple[Tensor, ...]


@register("attention")
def attention(options: Options) -> Iterator[BenchmarkRow]:
    """Forward and backward; the bound is the pairs a baseline computes over the visible ones.

    Baselines: the same kernels on the samples written out, packed without padding, whose pairs are
    the visible ones; the attention of the ``prefix-grouper`` package where it can be imported, as
    its documentation has it and with a causal prefix; and FlexAttention over the row on CUDA.
    Layers with a window, a sink or values of another size are compared with plain ones, too.
    """
    for shape in standard_shapes(options):
        yield from _compare(shape, options)
    yield from kind_rows(options)


def _compare(shape: Shape, options: Options) -> list[BenchmarkRow]:
    layer = plain_layer(options)
    packed, dout = layer.inputs(shape.tree.unique_tokens, options)
    expanded = [shape.packed.expand(x) for x in packed]
    expanded_dout = shape.packed.expand(dout)
    ours = _attend(shape.packed)
    paths = {
        "ours": measured_path(ours, packed, dout),
        "written out": measured_path(_attend(shape.written_out), expanded, expanded_dout),
    }
    bounds = {"written out": shape.pair_ratio}
    peers: dict[str, Attend] = {}
    for name, causal_prefix in PREFIX_GROUPERS.items():
        if options.takes(name) and _runs_prefix_grouper(shape, options):
            peers[name] = _prefix_grouper(shape, options, causal_prefix)
            bounds[name] = prefix_grouper_pairs(shape, causal_prefix) / shape.tree.attention_pairs
    if options.device.type == "cuda" and options.takes("flex"):
        peers["flex"], bounds["flex"] = flex(shape.packed, options.device), 1.0
    paths |= {name: measured_path(attend, packed, dout) for name, attend in peers.items()}

    out, *_ = paths["ours"]()
    want_out, *want_grads = paths["written out"]()
    pairs = [("out", shape.packed.expand(out), want_out)]
    # With an output gradient per sample, ours gets the sum over samples that share a row.
    summed = shape.packed.reduce(expanded_dout)
    _, *grads = measured_path(ours, packed, summed)()
    pairs += [
        (name, got, shape.packed.reduce(want))
        for name, got, want in zip(("dq", "dk", "dv"), grads, want_grads)
    ]
    bound = 1e-5 if options.dtype == torch.float32 else 3e-2
    error = {"written out": check_equal(pairs, bound)}
    for peer in peers:
        names = ("out", "dq", "dk", "dv")
        error[peer] = check_equal(list(zip(names, paths["ours"](), paths[peer]())), bound)

    times = time_interleaved(paths, options.num_rounds(9), options.clock)
    peaks = {name: peak_bytes(run) for name, run in paths.items()}
    return [
        BenchmarkRow(
            benchmark="attention",
            shape=shape.describe(
                heads=layer.num_heads,
                query_groups=layer.num_kv_heads,
                head_dim=layer.head_dim,
                dtype=str(options.dtype),
            ),
            baseline=name,
            bound=bounds[name],
            max_error=error[name],
            ours_peak_bytes=peaks["ours"],
            baseline_peak_bytes=peaks[name],
            ours_flops=2 * layer.multiplications(shape.packed),
            **times.against(name),
        )
        for name in bounds
        if options.takes(name)
    ]


def _attend(layout: PackedLayout) -> Attend:
    return lambda q, k, v: prefix_grouped_attention(q, k, v, layout)


def _runs_prefix_grouper(shape: Shape, options: Options) -> bool:
    # On a GPU heads are grouped, which its calls of SDPA do not take.
    if options.device.type == "cuda" or shape.tree.depth != 1:
        return False
    if shape.tree.segment_lens[1:].min() < 1:
        return False
    is_installed = importlib.util.find_spec("prefix_grouper") is not None
    if not is_installed:
        print(
            "attention: prefix-grouper is not installed, its comparison is left out",
            file=sys.stderr,
        )
    return is_installed


def prefix_grouper_pairs(shape: Shape, causal_prefix: bool) -> int:
    """Pairs that its calls compute: the prefix with itself, and padded suffixes with all."""
    prefix_len, *suffix_lens = shape.tree.segment_lens.tolist()
    longest = max(suffix_lens)
    own = prefix_len * (prefix_len + 1) // 2 if causal_prefix else prefix_len**2
    return int(own + len(suffix_lens) * longest * (prefix_len + longest))


def _prefix_grouper(shape: Shape, options: Options, causal_prefix: bool) -> Attend:
    """The package's attention on the packed row.

    It calls one attention function for the prefixes and for the suffixes, with a padding mask of
    the keys each time. SDPA gets the causal, bottom-right aligned mask that the package's own
    FlashAttention call implies, made once, although the package gives no place to keep it. A
    causal prefix is more than it can express: the prefix, which has no padding here, is recognised
    and takes SDPA's causal kernel.
    """
    from prefix_grouper import PrefixGrouper

    lens = shape.tree.segment_lens.tolist()
    grouper = PrefixGrouper([lens], device=options.device)
    masks: dict[tuple[int, int], Tensor] = {}

    def mask(q_len: int, kv_len: int, present: Tensor) -> Tensor:
        key = (q_len, kv_len)
        if key not in masks:
            causal = torch.ones(key, dtype=torch.bool, device=options.device).tril(kv_len - q_len)
            masks[key] = causal & present[:, None, None, :]
        return masks[key]

    def attend_padded(q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> Tensor:
        q_len, kv_len = q.shape[2], k.shape[2]
        if causal_prefix and q_len == kv_len:
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask(q_len, kv_len, present))
        return out.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = grouper.forward(attend_padded, *heads_first)
        return out[0]

    return attend


def flex(layout: PackedLayout, device: torch.device) -> Attend:
    """FlexAttention under the mask that ``dense_mask`` writes down, made once; compiled on CUDA.

    On the CPU it has no backward, so there it serves tests only.
    """
    subtree_end = layout.subtree_end.to(device)

    def is_visible(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q < subtree_end[kv])

    tokens = layout.total_tokens
    block_mask = create_block_mask(is_visible, None, None, tokens, tokens, device)
    run: Any = flex_attention
    if device.type == "cuda":
        run = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = run(*heads_first, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return attend
