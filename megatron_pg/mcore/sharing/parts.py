"""Which tokens of an ordinary row a context-parallel rank is fed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...tree import IntArray

_ZIGZAG = "zigzag"


def gather_parts(part: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """``[ranks x n]`` int64 on ``device``, every rank's ``[1, n]`` integers after another's."""
    own = part.detach().reshape(-1).to(device, torch.int64)
    whole = own.new_empty(group.size() * len(own))
    dist.all_gather_into_tensor(whole, own.contiguous(), group=group)
    return whole


def places_of_parts(bounds: IntArray, num_ranks: int, mode: str) -> IntArray:
    """``[num_ranks, T / num_ranks]`` place in the row of every token of a rank, ascending.

    ``zigzag``, as Megatron-Core divides rows: every sequence is cut into ``2 * num_ranks`` equal
    chunks, of which rank r has the r-th and the r-th from the end: of 8 tokens, rank 0 of 2 has 0,
    1, 6 and 7. ``contiguous``: the row is cut into ``num_ranks`` equal runs.

    Args:
        bounds: ``[num_sequences + 1]`` first token of every sequence, padding included.
        num_ranks: context-parallel ranks.
        mode: how they divide the row.

    Raises:
        ValueError: if they cannot.
    """
    num_tokens, lens = int(bounds[-1]), np.diff(bounds)
    if mode == _ZIGZAG:
        if (lens % (2 * num_ranks)).any():
            raise ValueError(
                f"the sequences of the row have {lens.tolist()} tokens, padding included; under "
                f"context_parallel_size={num_ranks} each must be a multiple of {2 * num_ranks}, "
                "since a rank has two of its chunks; pad every sequence, or set "
                "packed_seq_params.cp_partition_mode='contiguous' if a rank is fed a run of the row"
            )
        offsets = np.arange(num_tokens) - np.repeat(bounds[:-1], lens)
        chunks = offsets // np.repeat(lens // (2 * num_ranks), lens)
        ranks = np.minimum(chunks, 2 * num_ranks - 1 - chunks)
    elif num_tokens % num_ranks:
        raise ValueError(f"a row of {num_tokens} tokens is no multiple of {num_ranks}; pad it")
    else:
        ranks = np.arange(num_tokens) // (num_tokens // num_ranks)
    return np.argsort(ranks, kind="stable").reshape(num_ranks, -1)


def in_row(parts: IntArray, places: IntArray) -> IntArray:
    """Values of the ranks' tokens, one rank's after another's, in the order of the row."""
    row = np.empty_like(parts)
    row[places.reshape(-1)] = parts
    return row


def partition_mode(params: Any, group: dist.ProcessGroup | None) -> str:
    """How the ranks of ``group`` divide the row of some ``PackedSeqParams``.

    Raises:
        NotImplementedError: if it is divided in another way, or by others than these ranks.
    """
    size = 1 if group is None else group.size()
    if (local := getattr(params, "local_cp_size", None)) not in (None, size):
        raise NotImplementedError(
            f"local_cp_size={local}: a row that is divided by others than the model's "
            f"context_parallel_size={size} ranks (dynamic context parallelism); leave it out"
        )
    given = getattr(params, "cp_group", None)
    if given is not None and given.size() > 1 and not _is_same(given, group):
        raise NotImplementedError(
            f"cp_group of {given.size()} ranks that are not the model's own "
            f"context_parallel_size={size} ranks (dynamic context parallelism); leave it out"
        )
    mode: str = getattr(params, "cp_partition_mode", None) or _ZIGZAG
    if mode not in (_ZIGZAG, "contiguous"):
        raise NotImplementedError(
            f"cp_partition_mode={mode!r}: rows are divided as 'zigzag' or 'contiguous'"
        )
    return mode


def _is_same(given: Any, group: dist.ProcessGroup | None) -> bool:
    ranks = dist.get_process_group_ranks
    return given is group or (group is not None and ranks(given) == ranks(group))
