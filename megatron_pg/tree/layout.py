"""Where every token of a row stands: the one description that all other packages read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .checks import IntArray, as_integers
from .resident import ResidentSpans
from .tree import PrefixTree

Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """One row: the segments of several trees in pre-order, then padding.

    Built once per microbatch on the CPU and read by packing, attention, RoPE, loss and schedule.
    Per-token arrays are made on first use. Padding stands at the tail; each padding token sees
    only itself and belongs to no sample.

    Example, ``from_group(2, [1, 2])`` padded to 6 tokens::

        packed tokens  p0 p1 a0 b0 b1 --
        position_ids   0  1  2  2  3  0
        segment_ids    0  0  1  2  2  -1
        subtree_end    5  5  3  5  5  6
        multiplicity   2  2  1  1  1  0
        predictor_ids     0  1  1  3        (one per target: p1 predicts both a0 and b0)
        target_ids        1  2  3  4

    Attributes:
        forest: all trees of the row as one tree with several roots.
        tree_segment_offsets: ``[num_trees + 1]`` first segment of every tree.
        tree_sample_offsets: ``[num_trees + 1]`` first sample of every tree.
        total_tokens: length of the row, padding included.
        resident_spans: what trees whose prefix is resident see of the prefix rows.
    """

    forest: PrefixTree
    tree_segment_offsets: IntArray
    tree_sample_offsets: IntArray
    total_tokens: int
    resident_spans: tuple[ResidentSpans, ...] = ()

    def __post_init__(self) -> None:
        lens = self.forest.resident_lens
        expected = 0 if lens is None else int((lens * self._subtree_lens).sum())
        pairs = sum(spans.num_pairs for spans in self.resident_spans)
        if pairs != expected:
            raise ValueError(
                f"resident_spans hold {pairs} pairs, the resident prefixes of the trees "
                f"{expected}; name for every root the prefix row that it continues"
            )
        last = max((int(s.q_spans.max(initial=0)) for s in self.resident_spans), default=0)
        if last > self.unique_tokens:
            raise ValueError(
                f"resident_spans reach to token {last} of a row of {self.unique_tokens} tokens"
            )

    @property
    def num_trees(self) -> int:
        return len(self.tree_segment_offsets) - 1

    @property
    def num_samples(self) -> int:
        return self.forest.num_samples

    @property
    def unique_tokens(self) -> int:
        return self.forest.unique_tokens

    @property
    def logical_tokens(self) -> int:
        return self.forest.logical_tokens

    @property
    def reuse_ratio(self) -> float:
        """Logical tokens per unique token; above 1 means that something is shared."""
        return self.logical_tokens / self.unique_tokens

    @cached_property
    def max_position(self) -> int:
        """Largest logical position in the row."""
        return int((self.forest.segment_positions + self.forest.segment_lens).max()) - 1

    @cached_property
    def segment_ids(self) -> Tensor:
        """``[total_tokens]`` int64: owning segment; -1 on padding."""
        return self._per_token(np.arange(self.forest.num_segments), padding=-1)

    @cached_property
    def position_ids(self) -> Tensor:
        """``[total_tokens]`` int64: position in the written-out sequence; 0 on padding."""
        forest = self.forest
        offset = self._per_token(forest.segment_positions - forest.segment_starts, padding=0)
        position_ids = offset + torch.arange(self.total_tokens)
        position_ids[self.unique_tokens :] = 0
        return position_ids

    @cached_property
    def subtree_end(self) -> Tensor:
        """``[total_tokens]`` int64: first index after the token's subtree, half-open.

        A query q sees a key k iff ``k <= q < subtree_end[k]``.
        """
        subtree_end = self._per_token(self.forest.segment_subtree_ends, padding=0)
        index = torch.arange(self.unique_tokens, self.total_tokens)
        subtree_end[self.unique_tokens :] = index + 1
        return subtree_end

    @cached_property
    def multiplicity(self) -> Tensor:
        """``[total_tokens]`` int64: samples whose path holds the token; 0 on padding."""
        return self._per_token(self.forest.segment_multiplicity, padding=0)

    @cached_property
    def predictor_of(self) -> Tensor:
        """``[total_tokens]`` int64: packed index of the token before, on the same path.

        -1 for the first token of a written-out sequence and on padding: nothing predicts them.
        """
        forest = self.forest
        predictor_of = np.arange(-1, self.total_tokens - 1)
        parents = forest.segment_parents
        predictor_of[forest.segment_starts] = np.where(
            parents >= 0, forest.segment_ends[parents] - 1, -1
        )
        predictor_of[self.unique_tokens :] = -1
        return torch.from_numpy(predictor_of)

    @cached_property
    def target_ids(self) -> Tensor:
        """``[num_targets]`` int64: packed index of every token that another one predicts."""
        return torch.nonzero(self.predictor_of >= 0).flatten()

    @cached_property
    def predictor_ids(self) -> Tensor:
        """``[num_targets]`` int64: packed index whose hidden state predicts ``target_ids``.

        The last token of a shared segment stands here once per child.
        """
        return self.predictor_of[self.target_ids]

    @property
    def sample_lens(self) -> Tensor:
        """``[num_samples]`` int64: tokens of every written-out sample."""
        return torch.from_numpy(self.forest.sample_lens)

    def sample_indices(self, sample: int) -> Tensor:
        """``[L]`` int64: packed index of every token of ``sample``, root to leaf.

        Raises:
            IndexError: if the row has no such sample.
        """
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of a row with {self.num_samples} samples")
        path = self.forest.segment_path(int(self.forest.sample_segments[sample]))
        starts, ends = self.forest.segment_starts[path], self.forest.segment_ends[path]
        return torch.from_numpy(np.concatenate([np.arange(s, e) for s, e in zip(starts, ends)]))

    @cached_property
    def logical_to_packed(self) -> Tensor:
        """``[logical_tokens]`` int64: packed index of every token of sample 0, 1, 2, ..."""
        forest = self.forest
        # Path of every sample, one column a depth, -1 past the sample's end.
        columns, segment = [], forest.sample_segments
        while (segment >= 0).any():
            columns.append(segment)
            segment = np.where(segment >= 0, forest.segment_parents[segment], -1)
        path = np.stack(columns[::-1], axis=1).ravel()
        path = path[path >= 0]
        lens, starts = forest.segment_lens[path], forest.segment_starts[path]
        shift = np.repeat(starts - (np.cumsum(lens) - lens), lens)
        return torch.from_numpy(np.arange(len(shift)) + shift)

    def expand(self, packed: Tensor) -> Tensor:
        """Rows of ``packed`` in logical order: ``[total_tokens, ...] -> [logical_tokens, ...]``.

        Differentiable: the gradient of a shared token is the sum over its samples.

        Raises:
            ValueError: if ``packed`` has another number of rows.
        """
        self._check_rows("packed", packed, self.total_tokens)
        return packed.index_select(0, self.logical_to_packed.to(packed.device))

    def reduce(self, logical: Tensor) -> Tensor:
        """Sum logical rows per packed token, the transpose of ``expand``; 0 on padding.

        Raises:
            ValueError: if ``logical`` has another number of rows.
        """
        self._check_rows("logical", logical, self.logical_tokens)
        out = logical.new_zeros(self.total_tokens, *logical.shape[1:])
        return out.index_add(0, self.logical_to_packed.to(logical.device), logical)

    def pack_tokens(self, sequences: Sequence[Any], pad_id: int = 0) -> Tensor:
        """``[total_tokens]`` int64 row that holds the written-out ``sequences`` once.

        Args:
            sequences: one integer sequence per sample, prompt included.
            pad_id: token written on padding.

        Raises:
            ValueError: if a length differs from the layout's, or if samples disagree on a token
                that they share.
        """
        if len(sequences) != self.num_samples:
            raise ValueError(f"{len(sequences)} sequences for {self.num_samples} samples")
        tokens = [as_integers(f"sequences[{i}]", x) for i, x in enumerate(sequences)]
        for i, (sequence, length) in enumerate(zip(tokens, self.sample_lens.tolist())):
            if sequence.shape != (length,):
                raise ValueError(
                    f"sequences[{i}] has shape {tuple(sequence.shape)}, the layout says {(length,)}"
                )
        logical, index = torch.from_numpy(np.concatenate(tokens)), self.logical_to_packed
        row = torch.full((self.total_tokens,), pad_id, dtype=torch.int64)
        row[index] = logical
        wrong = torch.nonzero(row[index] != logical)
        if len(wrong):
            ends = np.cumsum(self.forest.sample_lens)
            sample = int(np.searchsorted(ends, int(wrong[0]), side="right"))
            position = int(wrong[0]) - int(ends[sample] - self.forest.sample_lens[sample])
            raise ValueError(
                f"sequences[{sample}] differs at position {position} from another sample that "
                "shares this token; samples of one tree must agree on shared tokens"
            )
        return row

    @cached_property
    def token_ids(self) -> Tensor:
        """``[total_tokens]`` int64 tokens, 0 on padding, of trees made by ``from_sequences``.

        Raises:
            ValueError: if the trees were built from lengths; use ``pack_tokens`` then.
        """
        if self.forest.token_ids is None:
            raise ValueError("the trees hold lengths only; call layout.pack_tokens(sequences)")
        row = torch.zeros(self.total_tokens, dtype=torch.int64)
        row[: self.unique_tokens] = torch.from_numpy(self.forest.token_ids)
        return row

    def derived(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """What ``make()`` gave when ``key`` was first asked for; it lives as long as the layout.

        For what other packages make of a row once, and read in every pass over it, in every layer,
        epoch and model chunk: copies on a device, tables of kernels. It must not refer to the
        layout, so that both go when nothing else holds the layout.
        """
        kept: dict[Hashable, Any] = self.__dict__.setdefault("_derived", {})
        if key not in kept:
            # A row may be evaluated first and trained then.
            with torch.inference_mode(False):
                kept[key] = make()
        value: Derived = kept[key]
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Without what is derived, which may lie on a device."""
        return {name: value for name, value in self.__dict__.items() if name != "_derived"}

    @property
    def _subtree_lens(self) -> IntArray:
        return self.forest.segment_subtree_ends - self.forest.segment_starts

    def _per_token(self, per_segment: IntArray, padding: int) -> Tensor:
        row = np.full(self.total_tokens, padding, dtype=np.int64)
        row[: self.unique_tokens] = np.repeat(per_segment, self.forest.segment_lens)
        return torch.from_numpy(row)

    @staticmethod
    def _check_rows(name: str, x: Tensor, rows: int) -> None:
        if x.shape[:1] != (rows,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, its first dim must be {rows}")
