"""The segments of one depth of a row, side by side, as a scan takes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..tree import IntArray, PrefixTree, to_device
from .copies import Copies

# Segments are ordered by how many runs of so many tokens they take, the chunks of scans.
CHUNK_TOKENS = 64


@dataclass(frozen=True, eq=False)
class Depth:
    """The segments of one depth, side by side; their states come from the depth above.

    Attributes:
        begin, end: of their tokens in depth-major order.
        lens: tokens of every segment; long ones first, as ``CHUNK_TOKENS`` counts them.
        cu_seqlens: ``[num_segments + 1]`` int64 bounds within ``begin:end``. One tensor for all
            layers: kernels keep what they make of it.
        chunks: ``[num_chunks, 2]`` int64: segment and number within it of every chunk, which
            kernels would else ask the device for.
        parents: of every segment, its place among those of the depth above; None for roots.
        is_continued: whether a segment has children, so that its final state is read.
    """

    begin: int
    end: int
    lens: tuple[int, ...]
    cu_seqlens: Tensor
    chunks: Tensor
    parents: Copies | None
    is_continued: bool

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """Segments of about as many chunks in one padded batch, for scans that have no varlen.

        The longest of a batch has at most 5/4 of the chunks of its shortest, so their number
        grows with the logarithm of the lengths, not with the segments.
        """
        chunks = _num_chunks(np.array(self.lens)).tolist()
        starts = [0]
        for i, n in enumerate(chunks):
            if chunks[starts[-1]] * 4 > n * 5:
                starts.append(i)
        bounds = np.cumsum([0, *self.lens])
        # A row may be evaluated first and trained then.
        with torch.inference_mode(False):
            return tuple(
                self._batch(first, last, bounds) for first, last in pairwise([*starts, len(chunks)])
            )

    def _batch(self, first: int, last: int, bounds: IntArray) -> Batch:
        lens = np.diff(bounds[first : last + 1])
        longest = int(lens.max())
        places = torch.from_numpy(runs(np.arange(len(lens)) * longest, lens))
        is_padded = bool((lens < longest).any())
        return Batch(
            num_tokens=int(bounds[last] - bounds[first]),
            shape=(last - first, longest),
            places=to_device([places], self.cu_seqlens.device)[0] if is_padded else None,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Segments of a depth in one batch, the shorter ones padded at their end.

    Attributes:
        num_tokens: of the segments, without padding.
        shape: segments, and tokens of the longest.
        places: ``[num_tokens]`` int64: of every token in the batch, counted through; None where
            all are equally long.
    """

    num_tokens: int
    shape: tuple[int, int]
    places: Tensor | None

    def pad(self, x: Tensor) -> Tensor:
        """``[segments, longest, ...]`` of ``[num_tokens, ...]``, zeros after the ends."""
        if self.places is None:
            return self._batched(x)
        empty = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return self._batched(empty.index_copy_(0, self.places, x))

    def unpad(self, x: Tensor) -> Tensor:
        """``[num_tokens, ...]`` of ``[segments, longest, ...]``."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def _batched(self, x: Tensor) -> Tensor:
        return x.reshape(*self.shape, *x.shape[1:])


def depth_major_order(forest: PrefixTree) -> IntArray:
    """``[num_segments]`` segments; what is equally deep and about as long stays in order."""
    return np.lexsort((-_num_chunks(forest.segment_lens), forest.segment_depths))


def _num_chunks(lens: IntArray) -> IntArray:
    return -(-lens // CHUNK_TOKENS)


def _chunks(lens: IntArray) -> IntArray:
    counts = _num_chunks(lens)
    segments = np.repeat(np.arange(len(lens)), counts)
    return np.stack([segments, runs(np.zeros_like(counts), counts)], axis=1)


def runs(starts: IntArray, lens: IntArray) -> IntArray:
    """``start, start + 1, ...`` of every run."""
    shift = np.repeat(starts - (np.cumsum(lens) - lens), lens)
    found: IntArray = np.arange(len(shift)) + shift
    return found


def make_depths(forest: PrefixTree, order: IntArray) -> tuple[tuple[Depth, ...], IntArray]:
    """All depths, and of every segment the place of its root among the roots."""
    parents, lens = forest.segment_parents, forest.segment_lens
    bounds = np.searchsorted(forest.segment_depths[order], np.arange(forest.depth + 2))
    place, root_of = np.empty_like(order), np.empty_like(order)
    has_children = np.zeros(len(order), dtype=bool)
    has_children[parents[parents >= 0]] = True
    depths, begin = [], 0
    for first, last in pairwise(bounds.tolist()):
        members = order[first:last]
        place[members] = np.arange(len(members))
        root_of[members] = root_of[parents[members]] if first else place[members]
        cu_seqlens = np.concatenate([[0], np.cumsum(lens[members])])
        depths.append(
            Depth(
                begin=begin,
                end=begin + int(cu_seqlens[-1]),
                lens=tuple(lens[members].tolist()),
                cu_seqlens=torch.from_numpy(cu_seqlens),
                chunks=torch.from_numpy(_chunks(lens[members])),
                parents=Copies.of(place[parents[members]]) if first else None,
                is_continued=bool(has_children[members].any()),
            )
        )
        begin = depths[-1].end
    return tuple(depths), root_of
