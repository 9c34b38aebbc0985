"""What CUDA's FlashAttention kernels have in common: their arguments and their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...tree import to_device
from ..plan import AttentionPass
from .base import AttentionInputs, MergingBackend


@dataclass(frozen=True, eq=False)
class VarlenArguments:
    """What a varlen kernel takes: int32 ``cu_seqlens`` on the device, lengths on the host.

    Of n queries and m keys of a sequence, query j sees keys up to j + m - n where ``causal``, and
    of those the last ``window + 1``.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int
    causal: bool
    window: int | None = None

    @classmethod
    def of(cls, attention_pass: AttentionPass, device: torch.device) -> VarlenArguments:
        """The spans of a pass; gaps become sequences without keys or without queries.

        For q spans [2, 5), [9, 11) of 12 rows and kv spans [0, 2), [7, 9) of 9, relative to the
        slices, the cumulative lengths are q ``0 2 2 5 9 9 11 12`` and kv ``0 0 0 2 2 7 9 9``.
        """
        ends = [(0, 0)]
        for (q_start, q_end), (kv_start, kv_end) in zip(
            attention_pass.q_spans.tolist(), attention_pass.kv_spans.tolist()
        ):
            last_kv_end = ends[-1][1]
            ends += [(q_start, last_kv_end), (q_start, kv_start), (q_end, kv_end)]
        num_rows = attention_pass.q_end - attention_pass.q_begin
        num_keys = attention_pass.kv_end - attention_pass.kv_begin
        ends += [(num_rows, ends[-1][1]), (num_rows, num_keys)]
        table = np.array(ends, dtype=np.int32)
        # Drop sequences that have neither queries nor keys.
        keep = np.append(True, (np.diff(table, axis=0) != 0).any(axis=1))
        table = table[keep]
        max_seqlen_q, max_seqlen_kv = np.diff(table, axis=0).max(axis=0).tolist()
        (on_device,) = to_device([torch.from_numpy(table.T.copy())], device)
        # FlashAttention-2 takes 1 for decoding, where every sequence has one query, and swaps
        # sequences and grouped heads; gaps have none.
        max_seqlen_q = max(max_seqlen_q, 2)
        return cls(
            on_device[0],
            on_device[1],
            max_seqlen_q,
            max_seqlen_kv,
            attention_pass.causal,
            attention_pass.window,
        )

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """In the order in which every kernel takes them."""
        return self.cu_seqlens_q, self.cu_seqlens_kv, self.max_seqlen_q, self.max_seqlen_kv


class CudaFlashBackend(MergingBackend):
    """A backend on FlashAttention for CUDA, whose kernels all have the same limits."""

    dtypes = (torch.bfloat16, torch.float16)
    device_type = "cuda"
    features = MergingBackend.features | {"window"}

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        refusal = super().refusal(inputs)
        if refusal is not None:
            return refusal
        # Smaller heads are padded to the larger.
        head_dim = max(inputs.head_dim, inputs.value_dim)
        if head_dim % 8 or head_dim > 256:
            return f"takes head_dim in multiples of 8 up to 256, got {head_dim}"
        if torch.version.hip is not None or not torch.cuda.is_available():
            return "needs an NVIDIA GPU, PyTorch finds none"
        capability = torch.cuda.get_device_capability(inputs.device)
        if capability < (8, 0):
            return "needs compute capability 8.0 (Ampere) or newer, {} has {}.{}".format(
                inputs.device, *capability
            )
        # These have too little shared memory for the backward pass.
        if 192 < head_dim <= 224 and capability not in ((8, 0), (9, 0)):
            return f"takes head_dim up to 192, or 232 to 256, on this GPU, got {head_dim}"
        return None

    def arguments(self, attention_pass: AttentionPass, device: torch.device) -> Any:
        """See ``VarlenKernel``; for kernels that take nothing but cumulative lengths."""
        return VarlenArguments.of(attention_pass, device)
