"""Ordinary rows, and what the sequences in them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...tree import IntArray, PackedLayout, PrefixTree, pack_trees
from .parts import gather_parts, in_row, partition_mode, places_of_parts


@dataclass(frozen=True, eq=False)
class OrdinaryRow:
    """A ``thd`` row on the host: sequences that stand one after another and cover all of it.

    Attributes:
        tokens: ``[T]`` int64.
        bounds: ``[num_sequences + 1]`` first token of every sequence, from 0 to T. Padding is as
            Megatron's kernels see it: what follows a sequence in its padded place belongs to it,
            what follows the last one is a sequence of its own.
        num_given: sequences that the caller has named, empty ones included.
        places: ``[ranks, T / ranks]`` of every context-parallel rank's tokens in the row; None
            where each is fed all of it.
    """

    tokens: IntArray
    bounds: IntArray
    num_given: int
    places: IntArray | None = None

    @classmethod
    def from_batch(
        cls,
        input_ids: Any,
        packed_seq_params: Any,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> OrdinaryRow:
        """The row of one call of a GPT model. What lies on a device is fetched in one copy.

        Args:
            input_ids: ``[1, T]`` integers; under context parallelism this rank's part of them,
                which are gathered.
            packed_seq_params: Megatron-Core's ``PackedSeqParams`` with ``cu_seqlens_q``.
            group: context-parallel ranks that divide the row; None if there is one.
            device: that they communicate on.

        Raises:
            ValueError: if they describe no such row.
            NotImplementedError: if other ranks divide it, or in a way of their own.
        """
        if input_ids is None:
            raise ValueError(
                "input_ids=None: every pipeline stage finds what the row shares from its tokens; "
                "pass input_ids on all of them, or set min_shared=None on the model"
            )
        _check_integers("input_ids", input_ids)
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, a packed row is [1, T] on every "
                "pipeline stage; concatenate the sequences"
            )
        mode = partition_mode(packed_seq_params, group)
        given = _bounds(packed_seq_params)
        if group is not None:
            assert device is not None
            input_ids = gather_parts(input_ids, group, device)
        tokens, *bounds = _on_host([input_ids, *given])
        if any(not np.array_equal(bounds[0], other) for other in bounds[1:]):
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_kv (or their padded ones) differ; self-attention over "
                "packed sequences takes the same for both"
            )
        covering, num_given = _covering(bounds[0], len(tokens)), len(bounds[0]) - 1
        if group is None:
            return cls(tokens, covering, num_given)
        if bounds[0][-1] != len(tokens):
            raise ValueError(
                f"cu_seqlens_q ends at {bounds[0][-1]}, but {group.size()} context-parallel ranks "
                f"were fed {len(tokens)} tokens together; give that of the whole row, every "
                "sequence's padding included"
            )
        places = places_of_parts(covering, group.size(), mode)
        return cls(in_row(tokens, places), covering, num_given, places)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def whole(
        self, values: Tensor, group: dist.ProcessGroup | None, device: torch.device
    ) -> Tensor:
        """``[T]`` integers on the CPU of those that each rank has of its own tokens."""
        if self.places is None or group is None:
            return values.reshape(-1).cpu()
        parts = gather_parts(values, group, device).cpu().numpy()
        return torch.from_numpy(in_row(parts, self.places))

    def sequences(self, first: int, last: int) -> list[IntArray]:
        """Those of ``[first, last)`` that are not empty."""
        ends = self.bounds[first : last + 1].tolist()
        return [self.tokens[a:b] for a, b in zip(ends, ends[1:]) if b > a]


def find_shared(
    row: OrdinaryRow, *, min_shared: int, group_sizes: Sequence[int] | None, pad_to_multiple: int
) -> PackedLayout:
    """The row with every run of tokens that its sequences share packed once, in linear time.

    Its samples are the row's sequences in their order, so ``logical_to_packed`` says for each of
    the row's T tokens where it is packed. Where nothing is shared it is the row as it came.

    Args:
        row: what was given.
        min_shared: shortest run that is shared.
        group_sizes: sequences of each group, in order; those of two groups share nothing, nor does
            what follows the last group. None: all sequences of the row may share.
        pad_to_multiple: as in ``pack_trees``.

    Raises:
        ValueError: if ``group_sizes`` are more than the row's sequences, or none.
    """
    groups = [row.sequences(a, b) for a, b in _group_borders(row, group_sizes)]
    groups = [sequences for sequences in groups if sequences]
    if not any(_may_share(sequences, min_shared) for sequences in groups):
        return _written_out(row, pad_to_multiple)
    trees = [PrefixTree.from_sequences(sequences, min_shared) for sequences in groups]
    return pack_trees(trees, pad_to_multiple)


def _group_borders(row: OrdinaryRow, sizes: Sequence[int] | None) -> list[tuple[int, int]]:
    num_sequences = len(row.bounds) - 1
    if sizes is None:
        return [(0, num_sequences)]
    sizes = [int(size) for size in sizes]
    if min(sizes, default=0) < 1 or sum(sizes) > row.num_given:
        raise ValueError(
            f"group_sizes={sizes} must each be at least 1 and at most {row.num_given} together, "
            "the sequences of cu_seqlens_q"
        )
    ends = np.cumsum(sizes).tolist()
    alone = [(i, i + 1) for i in range(ends[-1], num_sequences)]
    return [*zip([0, *ends], ends), *alone]


def _may_share(sequences: list[IntArray], min_shared: int) -> bool:
    """Whether two sequences begin alike; sequences that do not share nothing, and need no tree."""
    heads = [s[:min_shared].tobytes() for s in sequences if len(s) >= min_shared]
    return len(set(heads)) < len(heads)


def _written_out(row: OrdinaryRow, pad_to_multiple: int) -> PackedLayout:
    lens = np.diff(row.bounds)
    lens = lens[lens > 0]
    roots = np.full(len(lens), -1)
    tree = PrefixTree(lens, roots, np.arange(len(lens)), token_ids=row.tokens)
    return pack_trees([tree], pad_to_multiple)


def _bounds(params: Any) -> list[Tensor]:
    """Where sequences begin, as queries and as keys; once if the two are one tensor."""
    if getattr(params, "cu_seqlens_q", None) is None:
        raise ValueError("cu_seqlens_q=None: a 'thd' row's PackedSeqParams say where each begins")
    found: list[Tensor] = []
    for side in ("q", "kv"):
        padded = getattr(params, f"cu_seqlens_{side}_padded", None)
        bounds = getattr(params, f"cu_seqlens_{side}", None) if padded is None else padded
        if bounds is None or any(bounds is other for other in found):
            continue
        _check_integers(f"cu_seqlens_{side}", bounds)
        found.append(bounds)
    return found


def _check_integers(name: str, values: Any) -> None:
    if not torch.is_tensor(values) or values.is_floating_point() or values.dtype == torch.bool:
        kind = values.dtype if torch.is_tensor(values) else type(values).__name__
        raise ValueError(f"{name} must be a tensor of integers, got {kind}")


def _covering(bounds: IntArray, num_tokens: int) -> IntArray:
    """``bounds`` with what follows the last sequence as one more."""
    is_good = len(bounds) > 0 and bounds[0] == 0
    if not is_good or (np.diff(bounds) < 0).any() or bounds[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens_q={bounds.tolist()} must ascend from 0 to at most {num_tokens}, the "
            "tokens of input_ids"
        )
    return bounds if bounds[-1] == num_tokens else np.append(bounds, num_tokens)


def _on_host(tensors: Sequence[Tensor]) -> list[IntArray]:
    """Each as one-dimensional int64; those on a device in one copy, which waits for its queue."""
    flat = [t.detach().reshape(-1) for t in tensors]
    moved = [t.to(torch.int64) for t in flat if t.device.type != "cpu"]
    fetched = iter(torch.cat(moved).cpu().split([len(t) for t in moved]) if moved else ())
    return [(next(fetched) if t.device.type != "cpu" else t.to(torch.int64)).numpy() for t in flat]
