"""All attention backends by name, fastest first."""

from .base import AttentionBackend, AttentionInputs, MergingBackend
from .cpu import CpuBackend
from .cpu_fused import CpuFusedBackend
from .flash3 import Flash3Backend
from .flash_attn import FlashAttnBackend
from .reference import ReferenceBackend
from .torch_cuda import TorchFlashBackend

# The order is that of preference under "auto"; the quadratic reference is never picked.
ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        Flash3Backend(),
        TorchFlashBackend(),
        FlashAttnBackend(),
        CpuFusedBackend(),
        CpuBackend(),
        ReferenceBackend(),
    )
}

__all__ = ["ATTENTION_BACKENDS", "AttentionBackend", "AttentionInputs", "MergingBackend"]
