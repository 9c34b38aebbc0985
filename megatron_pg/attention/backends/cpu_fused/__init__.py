"""Tree attention as one kernel on CPUs with AVX-512: no passes, no merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kinds import AttentionKind, Scores
from ...padding import padding_dv, padding_out
from ...plan import AttentionPlan
from ...resident import ResidentKV
from ...sink import add_sink, sink_gradient
from ..base import AttentionBackend, AttentionInputs
from .build import compiler_refusal, operators
from .tiles import Tiles, make_tiles


class CpuFusedBackend(AttentionBackend):
    """An online softmax over every token's whole path, in C++ compiled when first called."""

    name = "cpu_fused"
    device_type = "cpu"
    dtypes = (torch.float32, torch.float64)
    features = frozenset({"window", "has_sink", "softcap", "value_dim"})

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        refusal = super().refusal(inputs)
        if refusal is not None:
            return refusal
        lanes = 64 // inputs.dtype.itemsize
        for name, size in (("head_dim", inputs.head_dim), ("value_dim", inputs.value_dim)):
            if size % lanes:
                return f"takes {name} in multiples of {lanes}, got {size}"
        capability = torch.backends.cpu.get_cpu_capability()
        if capability != "AVX512":
            return f"needs a CPU with AVX-512, PyTorch finds {capability}"
        return compiler_refusal()

    def prepare(self, plan: AttentionPlan, device: torch.device) -> Tiles:
        """The tables of the operators."""
        return make_tiles(plan)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prepared: Tiles,
        kind: AttentionKind,
        sink: Tensor | None = None,
        resident: Sequence[ResidentKV] = (),
    ) -> Tensor:
        """See ``AttentionBackend``."""
        scores = kind.scores(q.shape[2])
        out: Tensor = _FusedTreeAttention.apply(q, k, v, sink, prepared, scores, resident)
        return out


class _FusedTreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        tiles: Tiles,
        scores: Scores,
        resident: Sequence[ResidentKV],
    ) -> Tensor:
        q, k, v = (_heads_apart(x) for x in (q, k, v))
        tokens = tiles.unique_tokens
        kept = [resident[row] for row in tiles.prefix_rows]
        out = q.new_empty(*q.shape[:2], v.shape[2])
        lse = q.new_empty(q.shape[1], tokens)
        keys, values = [k, *(x.k for x in kept)], [v, *(x.v for x in kept)]
        ctx.factors = scores.scale, scores.softcap or 0.0
        operators().tree_forward(q, keys, values, tiles.tables, *ctx.factors, out, lse)
        if sink is not None:
            add_sink(out[:tokens], lse, sink)
        out[tokens:] = padding_out(v[tokens:], q.shape[1])
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.tiles, ctx.kept = tiles, kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        kept, tokens = ctx.kept, lse.shape[1]
        dout = _heads_apart(dout)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grads = [x.grads() for x in kept]
        operators().tree_backward(
            dout,
            q,
            [k, *(x.k for x in kept)],
            [v, *(x.v for x in kept)],
            out,
            lse,
            ctx.tiles.tables,
            *ctx.factors,
            dq,
            [dk, *(kept_dk for kept_dk, _ in grads)],
            [dv, *(kept_dv for _, kept_dv in grads)],
        )
        dq[tokens:] = 0
        dv[tokens:] = padding_dv(dout[tokens:], v.shape[1])
        dsink = None
        if ctx.needs_input_grad[3]:
            dsink = sink_gradient(dout[:tokens], out[:tokens], lse, sink)
        return dq, dk, dv, dsink, None, None, None


def _heads_apart(x: Tensor) -> Tensor:
    """``x``, ``[T, H, D]``, with each head's rows one after another in memory.

    Rows of all heads side by side are usually a power of two apart; a cache holds those of one
    head in a few of its sets.
    """
    return x.transpose(0, 1).contiguous().transpose(0, 1)
