"""What a group of samples shares: a compressed prefix tree over their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .checks import MAX_TOKENS, IntArray, as_integers, as_length, as_list
from .radix import build_radix_segments


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Token runs (segments) of one group in depth-first pre-order, and where each sample ends.

    Sample ``i`` equals the concatenation of the segments on the path from a root to
    ``sample_segments[i]``. A sample may end at any segment, several samples may end at the same
    one, and a tree may have several roots (samples of one group whose first tokens differ). A tree
    may also hold only what follows a resident prefix (see ``without_prefix``).

    Attributes:
        segment_lens: ``[num_segments]`` tokens per segment, all positive.
        segment_parents: ``[num_segments]`` index of the parent, -1 for a root.
        sample_segments: ``[num_samples]`` segment at whose end the sample ends, caller's order.
        token_ids: ``[unique_tokens]`` tokens in packed order, or None when only lengths are known.
        resident_lens: ``[num_segments]`` tokens that stand before a root in another row and that
            all its tokens see, 0 for other segments; None when there are none.

    Raises:
        ValueError: if the arrays do not describe a tree in pre-order whose every segment belongs
            to a sample.
    """

    segment_lens: IntArray
    segment_parents: IntArray
    sample_segments: IntArray
    token_ids: IntArray | None = None
    resident_lens: IntArray | None = None

    def __post_init__(self) -> None:
        for name in ("segment_lens", "segment_parents", "sample_segments", "resident_lens"):
            if name == "resident_lens" and self.resident_lens is None:
                continue
            array = as_integers(name, getattr(self, name)).copy()
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", as_integers("token_ids", self.token_ids))
        self._check()

    @classmethod
    def from_group(cls, prefix_len: int, suffix_lens: Sequence[int]) -> PrefixTree:
        """Tree of one prompt and its responses; responses share nothing among themselves.

        Args:
            prefix_len: tokens of the shared prompt, at least 1.
            suffix_lens: tokens of every response, each at least 1, in sample order.

        Raises:
            ValueError: on an empty group or a length below 1.
        """
        lens = [as_length("prefix_len", prefix_len)]
        suffixes = as_list("suffix_lens", suffix_lens)
        lens += [as_length(f"suffix_lens[{i}]", n) for i, n in enumerate(suffixes)]
        if len(lens) == 1:
            raise ValueError("suffix_lens is empty: a group needs at least one response")
        parents = np.zeros(len(lens), dtype=np.int64)
        parents[0] = -1
        return cls(np.array(lens), parents, np.arange(1, len(lens)))

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Any],
        min_shared: int = 1,
        labels: Sequence[npt.NDArray[Any]] | None = None,
    ) -> PrefixTree:
        """Tree of every run of tokens that at least two sequences share, at any depth.

        Equal sequences end at the same segment, and a sequence may be a prefix of another. Takes
        time linear in the number of tokens.

        Args:
            sequences: one-dimensional integer sequences (lists, arrays or CPU tensors), one per
                sample, prompt included.
            min_shared: shortest run of tokens after which samples part; shorter ones are written
                out. A run after which they do not costs nothing and is shared at any length.
            labels: ``[num_tokens, ...]`` of every sequence: what its tokens have to agree in too
                where they are shared, such as the experts that they are routed to.

        Raises:
            ValueError: on no sequences, an empty one, tokens that are no integers,
                ``min_shared < 1``, or labels that are not one per token.
        """
        as_length("min_shared", min_shared)
        samples = as_list("sequences", sequences)
        if not samples:
            raise ValueError("sequences is empty: a tree needs at least one sample")
        runs = [_as_tokens(i, tokens) for i, tokens in enumerate(samples)]
        if labels is not None and list(map(len, labels)) != list(map(len, runs)):
            raise ValueError(
                f"labels has the lengths {list(map(len, labels))}, the sequences have "
                f"{list(map(len, runs))}; give one label per token of every sequence"
            )
        return cls(*build_radix_segments(runs, min_shared, labels))

    def without_prefix(self, lens: Sequence[int] | IntArray) -> PrefixTree:
        """What follows the first tokens of every root, which stay resident in another row.

        Args:
            lens: ``[num_segments]`` tokens to be left out at the start of a segment; 0 for all
                that are no roots, and less than the length of the root.

        Raises:
            ValueError: if a length does not fit.
        """
        resident = as_integers("lens", lens)
        if resident.shape != self.segment_lens.shape or (resident >= self.segment_lens).any():
            raise ValueError(
                f"lens={resident.tolist()} must leave at least one token of each of the segments "
                f"of {self.segment_lens.tolist()} tokens"
            )
        if self.resident_lens is not None:
            raise ValueError("the tree has lost its prefix already; cut the whole tree")
        return PrefixTree(
            segment_lens=self.segment_lens - resident,
            segment_parents=self.segment_parents,
            sample_segments=self.sample_segments,
            resident_lens=resident,
        )

    @property
    def num_segments(self) -> int:
        return len(self.segment_lens)

    @property
    def num_samples(self) -> int:
        return len(self.sample_segments)

    @cached_property
    def segment_depths(self) -> IntArray:
        """``[num_segments]`` number of ancestors."""
        return ancestor_sums(self.segment_parents, np.ones(self.num_segments, dtype=np.int64))

    @cached_property
    def segment_positions(self) -> IntArray:
        """``[num_segments]`` logical position of the segment's first token."""
        if self.resident_lens is None:
            return ancestor_sums(self.segment_parents, self.segment_lens)
        before = ancestor_sums(self.segment_parents, self.segment_lens + self.resident_lens)
        return before + self.resident_lens

    @cached_property
    def segment_starts(self) -> IntArray:
        """``[num_segments]`` index of the segment's first token in packed order."""
        return np.cumsum(self.segment_lens) - self.segment_lens

    @cached_property
    def segment_ends(self) -> IntArray:
        """``[num_segments]`` index past the segment's last token in packed order."""
        return np.cumsum(self.segment_lens)

    @cached_property
    def segment_subtree_ends(self) -> IntArray:
        """``[num_segments]`` index past the last token of the segment's descendants."""
        return self.segment_starts + self._subtree_sums(self.segment_lens)

    @cached_property
    def segment_multiplicity(self) -> IntArray:
        """``[num_segments]`` number of samples whose path holds the segment."""
        return self._subtree_sums(np.bincount(self.sample_segments, minlength=self.num_segments))

    @cached_property
    def sample_lens(self) -> IntArray:
        """``[num_samples]`` tokens of every written-out sample, a resident prefix left out."""
        ends = ancestor_sums(self.segment_parents, self.segment_lens) + self.segment_lens
        return ends[self.sample_segments]

    @property
    def depth(self) -> int:
        """Largest number of ancestors of any segment."""
        return int(self.segment_depths.max())

    @property
    def unique_tokens(self) -> int:
        return int(self.segment_lens.sum())

    @property
    def logical_tokens(self) -> int:
        return int(self.sample_lens.sum())

    @cached_property
    def segment_pairs(self) -> IntArray:
        """``[num_segments]`` visible (q, kv) pairs of every segment's tokens, with themselves."""
        lens = self.segment_lens
        return lens * self.segment_positions + lens * (lens + 1) // 2

    @property
    def attention_pairs(self) -> int:
        """Visible (q, kv) pairs after sharing, with itself and a resident prefix included."""
        return int(self.segment_pairs.sum())

    @property
    def logical_attention_pairs(self) -> int:
        """Visible (q, kv) pairs of the written-out samples."""
        # In Python's integers: samples that share most of their tokens may have many.
        return sum(n * (n + 1) // 2 for n in self.sample_lens.tolist())

    def segment_path(self, segment: int) -> IntArray:
        """Segments from the root to ``segment``, both included."""
        path = [segment]
        while (parent := int(self.segment_parents[path[-1]])) >= 0:
            path.append(parent)
        return np.array(path[::-1], dtype=np.int64)

    def _subtree_sums(self, values: npt.NDArray[Any]) -> IntArray:
        return subtree_sums(self.segment_parents, self.segment_depths, values)

    def _check(self) -> None:
        lens, parents, ends = self.segment_lens, self.segment_parents, self.sample_segments
        index = np.arange(len(lens))
        if len(lens) == 0 or len(ends) == 0:
            raise ValueError("a tree needs at least one segment and one sample")
        if len(parents) != len(lens):
            raise ValueError(f"{len(parents)} segment_parents for {len(lens)} segment_lens")
        if lens.min() < 1:
            bad = int(np.argmin(lens))
            raise ValueError(f"segment_lens[{bad}]={lens[bad]} must be at least 1")
        resident = self.resident_lens
        before = 0.0 if resident is None else resident.max(initial=0).astype(float)
        if lens.astype(float).sum() + before > MAX_TOKENS:
            raise ValueError(
                f"segment_lens and resident_lens reach beyond {MAX_TOKENS} tokens, which no row "
                "holds; split the group"
            )
        if parents.min() < -1 or (parents >= index).any():
            raise ValueError("segment_parents must be -1 or the index of an earlier segment")
        if ends.min() < 0 or ends.max() >= len(lens):
            raise ValueError(f"sample_segments must lie in [0, {len(lens)}), got {ends.tolist()}")
        # Pre-order holds iff every subtree's index interval lies inside its parent's.
        last = index + self._subtree_sums(np.ones(len(lens), dtype=np.int64))
        child = parents >= 0
        if (last[child] > last[parents[child]]).any():
            raise ValueError("segments must be in depth-first pre-order")
        if self.segment_multiplicity.min() < 1:
            bad = int(np.argmin(self.segment_multiplicity))
            raise ValueError(f"segment {bad} lies on the path of no sample; leave it out")
        if self.token_ids is not None and len(self.token_ids) != self.unique_tokens:
            raise ValueError(f"{len(self.token_ids)} token_ids for {self.unique_tokens} tokens")
        if resident is not None and (len(resident) != len(lens) or resident.min() < 0):
            raise ValueError(f"resident_lens={resident} must be one length per segment, 0 or more")
        if resident is not None and (resident[child] > 0).any():
            raise ValueError("only a root can follow a resident prefix")


def ancestor_sums(parents: IntArray, values: npt.NDArray[Any]) -> IntArray:
    """Sum of ``values`` over each segment's ancestors, itself excluded.

    Pointer doubling: as many rounds as the logarithm of the depth.
    """
    # A virtual segment with value 0 and itself as parent stands above the roots.
    jump = np.append(np.where(parents < 0, len(parents), parents), len(parents))
    sums: IntArray = np.append(values, 0)[jump].astype(np.int64)
    while (jump != len(parents)).any():
        sums += sums[jump]
        jump = jump[jump]
    return sums[:-1]


def subtree_sums(parents: IntArray, depths: IntArray, values: npt.NDArray[Any]) -> IntArray:
    """Sum of ``values`` over each segment and its descendants."""
    sums = np.asarray(values, dtype=np.int64).copy()
    order = np.argsort(depths, kind="stable")
    bounds = np.searchsorted(depths[order], np.arange(int(depths.max()) + 2))
    for level in range(len(bounds) - 2, 0, -1):
        members = order[bounds[level] : bounds[level + 1]]
        np.add.at(sums, parents[members], sums[members])
    return sums


def _as_tokens(sample: int, tokens: Any) -> IntArray:
    integers = as_integers(f"sequences[{sample}]", tokens)
    if integers.size == 0:
        raise ValueError(f"sequences[{sample}] is empty: drop the sample")
    return integers
