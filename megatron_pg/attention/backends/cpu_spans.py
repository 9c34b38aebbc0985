"""Spans of a pass as batched calls: equal neighbours together, causal spans in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..plan import AttentionPass


@dataclass(frozen=True)
class SpanBatch:
    """Equal-length spans at equal distances: one batched kernel call."""

    num_spans: int
    q_start: int
    q_step: int
    q_len: int
    kv_start: int
    kv_step: int
    kv_len: int

    def pieces(self) -> Iterator[slice]:
        """Slices of a span's keys that share no key with the same slice of another span."""
        size = self.kv_step if 0 < self.kv_step < self.kv_len else self.kv_len
        for start in range(0, self.kv_len, size):
            yield slice(start, start + size)


def span_batches(attention_pass: AttentionPass) -> tuple[SpanBatch, ...]:
    """The spans as few batches: neighbours of equal lengths and distances go together."""
    table = np.concatenate([attention_pass.q_spans, attention_pass.kv_spans], axis=1)
    lens = np.stack([table[:, 1] - table[:, 0], table[:, 3] - table[:, 2]], axis=1)
    steps = np.diff(table[:, (0, 2)], axis=0)
    batches, first = [], 0
    while first < len(table):
        last = first
        while (
            last + 1 < len(table)
            and (lens[last + 1] == lens[first]).all()
            and (steps[last] == steps[first]).all()
        ):
            last += 1
        q_step, kv_step = steps[first] if last > first else (0, 0)
        batches.append(
            SpanBatch(
                num_spans=last - first + 1,
                q_start=int(table[first, 0]),
                q_step=int(q_step),
                q_len=int(lens[first, 0]),
                kv_start=int(table[first, 2]),
                kv_step=int(kv_step),
                kv_len=int(lens[first, 1]),
            )
        )
        first = last + 1
    return tuple(batches)


def split_causal_pass(causal_pass: AttentionPass, min_block: int) -> tuple[AttentionPass, ...]:
    """A causal pass as causal blocks on its diagonals and full rectangles below them.

    Equals the pass: every visible pair is in exactly one part, and the first part, the diagonals,
    covers every row. A span becomes as many as ``2**n`` blocks of one length (the last may be
    shorter) that is at least ``min_block``; part i + 1 holds its rectangles of ``2**i`` blocks.
    For 4 blocks, queries by keys, these are 1 x 0 and 3 x 2, then 2..3 x 0..1.
    """
    diagonals: list[tuple[int, int]] = []
    levels: list[list[tuple[int, int, int]]] = []
    for start, end in causal_pass.q_spans.tolist():
        num_levels = max(((end - start) // min_block).bit_length() - 1, 0)
        size = -(-(end - start) // 2**num_levels)
        diagonals += [(i, min(i + size, end)) for i in range(start, end, size)]
        levels += [[] for _ in range(num_levels - len(levels))]
        for level in levels[:num_levels]:
            level += [(i - size, i, min(i + size, end)) for i in range(start + size, end, 2 * size)]
            size *= 2
    own = np.array(diagonals)
    parts = [replace(causal_pass, q_spans=own, kv_spans=own)]
    for level in levels:
        edges = np.array(level)
        parts.append(
            replace(causal_pass, causal=False, q_spans=edges[:, 1:], kv_spans=edges[:, :2])
        )
    return tuple(parts)


def split_windowed_pass(windowed_pass: AttentionPass, block: int) -> AttentionPass:
    """A windowed pass as blocks of queries, each with all keys that one of them sees.

    Equals the pass under ``window_mask``. Blocks of a run overlap in their keys.
    """
    window = windowed_pass.window
    assert window is not None
    q_spans, kv_spans = [], []
    for (start, end), (kv_start, kv_end) in zip(
        windowed_pass.q_spans.tolist(), windowed_pass.kv_spans.tolist()
    ):
        shift = kv_end - end
        for first in range(start, end, block):
            last = min(first + block, end)
            q_spans.append((first, last))
            kv_spans.append((max(kv_start, first + shift - window), last + shift))
    return replace(
        windowed_pass, causal=False, q_spans=np.array(q_spans), kv_spans=np.array(kv_spans)
    )


def window_mask(block: int, window: int) -> Tensor:
    """``[block, window + block]``: 0 where query j sees a key, j to j + window; else -inf.

    For n queries of m keys, of which the last query sees the last, take the first n rows and the m
    columns up to ``window + n``.
    """
    distance = torch.arange(window + block)[None, :] - torch.arange(block)[:, None]
    hidden = (distance < 0) | (distance > window)
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
