"""Rotary tables by the logical positions of a row's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowRotary:
    """Rows of rotary tables, each made once and kept for the next layer.

    Megatron's ``rope`` and ``yarn`` make one row per position and ignore ``position_ids``. Layers
    of a row are handed the same table one after another.

    Args:
        position_ids: ``[tokens of the row]`` int64 logical positions on the device.
        num_positions: rows of every table.
    """

    def __init__(self, position_ids: Tensor, num_positions: Any) -> None:
        self._position_ids = position_ids
        self._num_positions = num_positions
        self._source: Tensor | None = None
        self._gathered: Tensor | None = None
        self._turning: tuple[Tensor, Tensor, Tensor] | None = None

    def gather(self, table: Any) -> Any:
        """``[tokens, 1, 1, D]`` of a table ``[positions, 1, 1, D]``, of each of a tuple, or None.

        Raises:
            ValueError: if the table is not indexed by position (``mrope``).
        """
        if table is None:
            return None
        if isinstance(table, tuple):
            gathered = tuple(self.gather(part) for part in dict.fromkeys(table))
            return gathered * 2 if len(gathered) == 1 else gathered
        if table.shape[0] != self._num_positions or table.shape[1] != 1:
            raise ValueError(
                f"the rotary table has shape {tuple(table.shape)}, expected one row for each of "
                f"{self._num_positions} positions; use position_embedding_type 'rope', 'yarn', "
                "'learned_absolute' or 'none' ('mrope' is not supported)"
            )
        # Recompute hands in detached copies, so storage decides what is the same table.
        source = self._source
        if source is None or source.data_ptr() != table.data_ptr() or source.dtype != table.dtype:
            self._source = table.detach()
            self._gathered = self._source.index_select(0, self._position_ids)
        return self._gathered

    def cos_and_sin(self, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[tokens, 1, 1, D]`` cosines and ``[tokens, 1, 1, D / 2]`` sines.

        Args:
            table: as ``gather`` takes it; its halves are equal.
            dtype: of the queries and keys that they turn.
        """
        gathered = self.gather(table)
        kept = self._turning
        if kept is None or kept[0] is not gathered or kept[1].dtype != dtype:
            half = gathered[..., : gathered.shape[-1] // 2]
            kept = gathered, gathered.cos().to(dtype), half.sin().to(dtype)
            self._turning = kept
        return kept[1:]
