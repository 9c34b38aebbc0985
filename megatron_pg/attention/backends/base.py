"""What a backend is: a complete tree attention that says what it can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..merge import LseMergeAttention, VarlenKernel
from ..plan import AttentionPlan
from ..resident import ResidentKV


@dataclass(frozen=True)
class AttentionInputs:
    """What decides whether a backend can run: device, dtype and head sizes."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> AttentionInputs:
        """Describe ``q [T, Hq, D]`` and ``k [T, Hkv, D]``."""
        return cls(q.device, q.dtype, q.shape[2], q.shape[1], k.shape[1])


class AttentionBackend(Protocol):
    """Attention of every sample over its own path, differentiable in q, k, v.

    Attributes:
        name: in the registry.
        merges: whether it merges passes, by what ``merge_implementation`` names.
    """

    name: str
    merges: bool

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        softmax_scale: float,
        resident: Sequence[ResidentKV] = (),
    ) -> Tensor:
        """``[T, Hq, D]`` output; the backward pass adds to the gradients of ``resident``."""


class MergingBackend:
    """A backend made of a varlen kernel and the merge."""

    name: str
    merges = True
    kernel: VarlenKernel
    dtypes: tuple[torch.dtype, ...]
    device_type: str
    max_head_dim: int | None = None

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        if inputs.device.type != self.device_type:
            return f"needs tensors on {self.device_type}, got {inputs.device}"
        if inputs.dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, got {inputs.dtype}"
        if self.max_head_dim is not None and inputs.head_dim > self.max_head_dim:
            return f"takes head_dim up to {self.max_head_dim}, got {inputs.head_dim}"
        return None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        softmax_scale: float,
        resident: Sequence[ResidentKV] = (),
    ) -> Tensor:
        """``[T, Hq, D]`` output; the backward pass adds to the gradients of ``resident``."""
        out: Tensor = LseMergeAttention.apply(q, k, v, plan, self.kernel, softmax_scale, resident)
        return out
