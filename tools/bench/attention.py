"""Attention alone, forward and backward, against written-out rows and against a peer."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_pg import PackedLayout, prefix_grouped_attention
from megatron_pg.attention import make_attention_plan
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.shapes import Shape, standard_shapes
from tools.bench.timing import check_equal, peak_bytes, time_interleaved

NUM_HEADS, HEAD_DIM = 4, 64
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# (out, dq, dk, dv)
Results = tuple[Tensor, ...]


@register("attention")
def attention(options: Options) -> Iterator[BenchmarkRow]:
    """Forward and backward; the bound is the ratio of visible pairs.

    Baselines: the same kernels on the samples written out, packed without padding; and the
    attention of the ``prefix-grouper`` package where it can be imported.
    """
    for shape in standard_shapes(options):
        yield from _compare(shape, options)


def _compare(shape: Shape, options: Options) -> list[BenchmarkRow]:
    generator = torch.Generator().manual_seed(0)
    size = (4, shape.tree.unique_tokens, NUM_HEADS, HEAD_DIM)
    *packed, dout = torch.randn(size, generator=generator).to(options.device, options.dtype)
    expanded = [shape.packed.expand(x) for x in packed]
    expanded_dout = shape.packed.expand(dout)
    ours = _attend(shape.packed, options.device)
    paths = {
        "ours": _path(ours, packed, dout),
        "written out": _path(_attend(shape.written_out, options.device), expanded, expanded_dout),
    }
    peer = _prefix_grouper(shape, options)
    if peer is not None:
        paths["prefix-grouper"] = _path(peer, packed, dout)

    out, *_ = paths["ours"]()
    want_out, *want_grads = paths["written out"]()
    pairs = [("out", shape.packed.expand(out), want_out)]
    # With an output gradient per sample, ours gets the sum over samples that share a row.
    summed = shape.packed.reduce(expanded_dout)
    _, *grads = _path(ours, packed, summed)()
    pairs += [
        (name, got, shape.packed.reduce(want))
        for name, got, want in zip(("dq", "dk", "dv"), grads, want_grads)
    ]
    bound = 1e-5 if options.dtype == torch.float32 else 3e-2
    error = {"written out": check_equal(pairs, bound)}
    if peer is not None:
        names = ("out", "dq", "dk", "dv")
        pairs = list(zip(names, paths["ours"](), paths["prefix-grouper"]()))
        error["prefix-grouper"] = check_equal(pairs, bound)

    times = time_interleaved(paths, options.num_rounds(9), options.clock)
    peaks = {name: peak_bytes(run) for name, run in paths.items()}
    return [
        BenchmarkRow(
            benchmark="attention",
            shape=shape.describe(heads=NUM_HEADS, head_dim=HEAD_DIM, dtype=str(options.dtype)),
            baseline=name,
            bound=shape.pair_ratio if name == "written out" else 1.0,
            max_error=error[name],
            ours_peak_bytes=peaks["ours"],
            baseline_peak_bytes=peaks[name],
            **times.against(name),
        )
        for name in paths
        if name != "ours"
    ]


def _attend(layout: PackedLayout, device: torch.device) -> Attend:
    plan = make_attention_plan(layout, device)
    return lambda q, k, v: prefix_grouped_attention(q, k, v, plan)


def _path(attend: Attend, qkv: list[Tensor], dout: Tensor) -> Callable[[], Results]:
    leaves = [x.detach().requires_grad_() for x in qkv]

    def run() -> Results:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return run


def _prefix_grouper(shape: Shape, options: Options) -> Attend | None:
    """The peer's attention on the packed row; None where it cannot run this shape.

    It takes ``[batch, heads, seq, head_dim]`` and an attention function; SDPA gets the causal,
    bottom-right aligned mask that the package's own FlashAttention call implies, made once.
    """
    if shape.tree.depth != 1 or shape.tree.segment_lens[1:].min() < 1:
        return None
    if importlib.util.find_spec("prefix_grouper") is None:
        print(
            "attention: prefix-grouper is not installed, its comparison is left out",
            file=sys.stderr,
        )
        return None
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
        if q_len == kv_len and q.shape[0] == 1:
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask(q_len, kv_len, present))
        return out.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = grouper.forward(attend_padded, *heads_first)
        return out[0]

    return attend
