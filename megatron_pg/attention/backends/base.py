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

    def __post_init__(self) -> None:
        """Refuse heads that no attention has."""
        if min(self.head_dim, self.num_heads, self.num_kv_heads) < 1 or (
            self.num_heads % self.num_kv_heads
        ):
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}, none of them 0, and head_dim={self.head_dim} at least 1"
            )

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

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        if inputs.device.type != self.device_type:
            return f"needs tensors on {self.device_type}, got {inputs.device}"
        if inputs.dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, got {inputs.dtype}"
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


class CudaFlashBackend(MergingBackend):
    """A backend on FlashAttention-2 for CUDA, whose kernels all have the same limits."""

    dtypes = (torch.bfloat16, torch.float16)
    device_type = "cuda"

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        refusal = super().refusal(inputs)
        if refusal is not None:
            return refusal
        head_dim = inputs.head_dim
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
