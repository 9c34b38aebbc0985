"""PyTorch's own CUDA varlen kernel: FlashAttention, no extra package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..kinds import Scores
from .base import AttentionInputs
from .cuda_flash import CudaFlashBackend, VarlenArguments

# Keys are never split where that can be said: the length of one row would change the order of sums
# in another.
_TAKES_SPLITS = "num_splits" in str(torch.ops.aten._flash_attention_forward.default._schema)
_SPLITS = {"num_splits": 1} if _TAKES_SPLITS else {}

_RESTORE = "call torch.nn.attention.restore_flash_attention_impl()"


class TorchFlashBackend(CudaFlashBackend):
    """``aten::_flash_attention_forward`` and its backward, varlen form.

    What ``torch.nn.attention.activate_flash_attention_impl`` activated runs under these names. The
    backward takes no used lengths of sequences, so gaps between spans are empty sequences.
    """

    name = "flash"

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        refusal = super().refusal(inputs)
        if refusal is not None:
            return refusal
        if not torch.backends.cuda.is_flash_attention_available():
            return "needs FlashAttention, which this PyTorch was built without"
        return _activated_refusal(inputs)

    def kernels(self) -> str | None:
        """FA3 where that was activated."""
        return _activated()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, arguments: VarlenArguments, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q, k, v),
            *arguments.lengths,
            0.0,
            arguments.causal,
            False,
            scale=scores.scale,
            **_window(arguments),
            **_SPLITS,
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        arguments: VarlenArguments,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``VarlenKernel``."""
        tensors = (dout, q, k, v, out, lse.contiguous())
        # Only read under dropout, but the operator wants the tensors.
        rng = torch.empty(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *tensors,
            *arguments.lengths,
            0.0,
            arguments.causal,
            *rng,
            scale=scores.scale,
            **_window(arguments),
        )
        return dq, dk, dv


def _window(arguments: VarlenArguments) -> dict[str, int]:
    """Keys seen to the left and right of a query's own place; nothing said is all."""
    if arguments.window is None:
        return {}
    return {"window_size_left": arguments.window, "window_size_right": 0}


def _activated() -> str | None:
    """What was activated in place of PyTorch's own kernels."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def _activated_refusal(inputs: AttentionInputs) -> str | None:
    name = _activated()
    if name is None:
        return None
    if name != "FA3":
        return f"is known to be right with PyTorch's own kernels and FA3, not {name}; {_RESTORE}"
    if TorchVersion(torch.__version__) < TorchVersion("2.13"):
        return f"trains with FA3 from PyTorch 2.13 on, this is {torch.__version__}; {_RESTORE}"
    capability = torch.cuda.get_device_capability(inputs.device)
    if capability != (9, 0):
        return "has FA3 activated, which needs compute capability 9.0, {} has {}.{}; {}".format(
            inputs.device, *capability, _RESTORE
        )
    return None
