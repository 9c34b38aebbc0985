"""A row's passes as a varlen kernel runs them: its arguments, and the keys that are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..tree import IntArray, to_device
from .kernels import merge_functions
from .kinds import Scores
from .plan import AttentionPass, AttentionPlan
from .resident import ResidentKV
from .windows import make_windowed_pass


class VarlenKernel(Protocol):
    """Attention of each query span over its key span, with log-sum-exp in and out.

    q is ``[Tq, Hq, D]``, k and v are ``[Tkv, Hkv, D]``: the slices named by the pass, padded to
    one D where values are of another size that the kernel does not take. Rows outside the spans
    are neither read nor meaningful in what is returned.
    """

    def takes_value_dim(self, head_dim: int, value_dim: int) -> bool:
        """Whether values of another size than queries and keys are given as they are."""

    def arguments(self, attention_pass: AttentionPass, device: torch.device) -> Any:
        """What the kernel takes for a pass besides tensors, made once per row."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, arguments: Any, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """``(out [Tq, Hq, D], lse [Hq, Tq])``, lse natural, in fp32 (fp64 for fp64)."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        arguments: Any,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` with probabilities ``exp(scores - lse)`` and ``rowsum(dout * out)``.

        out and lse are the merged ones, so each pass returns its exact share of the gradient.
        """


class KernelGather(NamedTuple):
    """``Gather`` on the device."""

    prefix_row: int | None
    rows: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class KernelPass:
    """A pass as it is run.

    Attributes:
        queries, keys: slices of the row that the kernel gets.
        q_rows, kv_rows: rows of these slices that lie in a span, as ``select_rows`` of what merges
            says it; None when all do, and of the first pass, which nothing was before.
        prefix_row: as in ``AttentionPass``.
        arguments: of the kernel.
        gathers: as in ``AttentionPass``, of the only pass under a window.
    """

    queries: slice
    keys: slice
    q_rows: Tensor | None
    kv_rows: Tensor | None
    prefix_row: int | None
    arguments: Any
    gathers: tuple[KernelGather, ...] = ()


@dataclass(frozen=True, eq=False)
class KernelPasses:
    """A plan as it is run; the first pass covers all ``unique_tokens``.

    The row's padding is a gap at its end, so what it returns has the rows of the whole row.
    """

    unique_tokens: int
    passes: tuple[KernelPass, ...]

    @classmethod
    def of(cls, plan: AttentionPlan, kernel: VarlenKernel, device: torch.device) -> KernelPasses:
        """Prepare a row's passes for a kernel and a device."""
        planned = plan.passes
        if plan.window is not None:
            planned = (make_windowed_pass(plan.layout, plan.window),)
        tokens = plan.layout.total_tokens
        kv_end = planned[0].kv_end if planned[0].gathers else tokens
        planned = (replace(planned[0], q_end=tokens, kv_end=kv_end), *planned[1:])

        select = merge_functions(device).select_rows

        def moved(index: NDArray[np.generic]) -> Tensor:
            return to_device([torch.from_numpy(index)], device)[0]

        def selected(spans: IntArray, num_rows: int) -> Tensor | None:
            rows = select(spans, num_rows)
            return None if rows is None else moved(rows)

        passes = tuple(
            KernelPass(
                queries=slice(p.q_begin, p.q_end),
                keys=slice(p.kv_begin, p.kv_end),
                q_rows=selected(p.q_spans, p.q_end - p.q_begin) if number else None,
                kv_rows=selected(p.kv_spans, p.kv_end - p.kv_begin) if number else None,
                prefix_row=p.prefix_row,
                arguments=kernel.arguments(p, device),
                gathers=tuple(
                    KernelGather(g.prefix_row, moved(g.rows), moved(g.places)) for g in p.gathers
                ),
            )
            for number, p in enumerate(planned)
        )
        return cls(plan.layout.unique_tokens, passes)


def keys_and_values(
    k: Tensor, v: Tensor, p: KernelPass, resident: Sequence[ResidentKV]
) -> tuple[Tensor, Tensor]:
    """What the pass's key spans index: the row's own keys and values, a prefix row's, or copies."""
    if p.gathers:
        sources = [_source(k, v, g.prefix_row, resident) for g in p.gathers]
        return _gather([x for x, _ in sources], p), _gather([x for _, x in sources], p)
    return _source(k, v, p.prefix_row, resident)


def _source(
    k: Tensor, v: Tensor, prefix_row: int | None, resident: Sequence[ResidentKV]
) -> tuple[Tensor, Tensor]:
    if prefix_row is None:
        return k, v
    kept = resident[prefix_row]
    return kept.k, kept.v


def _gather(sources: Sequence[Tensor], p: KernelPass) -> Tensor:
    if len(p.gathers) == 1:
        return sources[0].index_select(0, p.gathers[0].rows)
    gathered = sources[0].new_empty(p.keys.stop, *sources[0].shape[1:])
    for source, (_, rows, places) in zip(sources, p.gathers):
        gathered.index_copy_(0, places, source.index_select(0, rows))
    return gathered


def scatter_gradients(
    dk: Tensor, dv: Tensor, tokens: int, p: KernelPass, resident: Sequence[ResidentKV]
) -> tuple[Tensor, Tensor]:
    """Gradients of the row's keys and values from those of copies; a prefix row's go to it."""
    own = dk.new_zeros(tokens, *dk.shape[1:]), dv.new_zeros(tokens, *dv.shape[1:])
    for prefix_row, rows, places in p.gathers:
        totals = own if prefix_row is None else resident[prefix_row].grads()
        for total, share in zip(totals, (dk, dv)):
            total.index_add_(0, rows, share.index_select(0, places))
    return own
