"""FlashAttention-3: the varlen kernels of Hopper."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...tree import IntArray, to_device
from ..kinds import Scores
from ..plan import AttentionPass
from .base import AttentionInputs
from .cuda_flash import CudaFlashBackend

_REMEDY = "install a FlashAttention-3 that was built for this PyTorch, or use 'flash'"
_HEAD_DIMS = (64, 96, 128, 192, 256)
_TENSORS = {"fwd": {"q", "k", "v"}, "bwd": {"dout", "q", "k", "v", "out", "softmax_lse"}}
_LENGTHS = {"cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"}
_LENGTHS |= {"max_seqlen_q", "max_seqlen_k"}
_SCORES = {"softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap"}


@dataclass(frozen=True, eq=False)
class UsedLengths:
    """Sequences that end before the next one begins: int32 on the device, longest on the host.

    Of n queries and m keys that a sequence uses, query j sees keys up to j + m - n where
    ``causal``, and of those the last ``window + 1``. Nothing is computed for rows that no
    sequence uses, and what is written there is not read.

    Attributes:
        cu_seqlens_q, cu_seqlens_kv: where sequences begin, and the number of rows.
        seqused_q, seqused_kv: how many rows each uses; None where that is all.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    seqused_q: Tensor | None
    seqused_kv: Tensor | None
    max_seqlen_q: int
    max_seqlen_kv: int
    causal: bool
    window: int | None = None

    @classmethod
    def of(cls, attention_pass: AttentionPass, device: torch.device) -> UsedLengths:
        """The spans of a pass: one sequence each, to which the gap after it belongs.

        For q spans [0, 3), [7, 9) of 9 rows: ``cu_seqlens_q`` 0 7 9, ``seqused_q`` 3 2.
        """
        p = attention_pass
        begins = [
            np.append(spans[:, 0], num_rows)
            for spans, num_rows in ((p.q_spans, p.q_end - p.q_begin), (p.kv_spans, _kv_rows(p)))
        ]
        lens = [np.diff(spans)[:, 0] for spans in (p.q_spans, p.kv_spans)]
        table = np.concatenate([*begins, *lens]).astype(np.int32)
        (on_device,) = to_device([torch.from_numpy(table)], device)
        n = len(p.q_spans)
        cu_q, cu_kv, used_q, used_kv = on_device.split([n + 1, n + 1, n, n])
        return cls(
            cu_q,
            cu_kv,
            used_q if _has_gaps(begins[0], lens[0]) else None,
            used_kv if _has_gaps(begins[1], lens[1]) else None,
            int(lens[0].max()),
            int(lens[1].max()),
            p.causal,
            p.window,
        )

    def arguments(self, scores: Scores) -> dict[str, Tensor | int | float | bool | None]:
        """What both operators take besides tensors."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_kv,
            "seqused_q": self.seqused_q,
            "seqused_k": self.seqused_kv,
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_kv,
            "softmax_scale": scores.scale,
            "is_causal": self.causal,
            "window_size_left": -1 if self.window is None else self.window,
            "window_size_right": -1 if self.window is None else 0,
            "softcap": scores.softcap or 0.0,
        }


def _kv_rows(p: AttentionPass) -> int:
    return p.kv_end - p.kv_begin


def _has_gaps(begins: IntArray, lens: IntArray) -> bool:
    return bool((np.diff(begins) != lens).any())


class Flash3Backend(CudaFlashBackend):
    """``flash_attn_3::fwd`` and ``flash_attn_3::bwd``, which ``flash_attn_interface`` brings."""

    name = "flash3"
    features = CudaFlashBackend.features | {"softcap"}

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        refusal = super().refusal(inputs)
        if refusal is not None:
            return refusal
        capability = torch.cuda.get_device_capability(inputs.device)
        if capability != (9, 0):
            return "needs compute capability 9.0 (Hopper), {} has {}.{}".format(
                inputs.device, *capability
            )
        return package_refusal() or next(_build_refusals(inputs), None)

    def takes_value_dim(self, head_dim: int, value_dim: int) -> bool:
        """See ``VarlenKernel``: the kernels know heads of 192 with values of 128."""
        known = 128 < head_dim <= 192 and 96 < value_dim <= 128
        return known and not _is_disabled("FLASH_ATTENTION_DISABLE_HDIMDIFF192")

    def arguments(self, attention_pass: AttentionPass, device: torch.device) -> UsedLengths:
        """See ``VarlenKernel``."""
        return UsedLengths.of(attention_pass, device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, arguments: UsedLengths, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        # Keys are never split: that would let another row's length change the order of sums.
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            q, k, v, **arguments.arguments(scores), num_splits=1
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
        arguments: UsedLengths,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``VarlenKernel``."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.ops.flash_attn_3.bwd(
            *(dout, q, k, v, out, lse.contiguous()),
            **{"dq": dq, "dk": dk, "dv": dv},
            **arguments.arguments(scores),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


@functools.cache
def package_refusal() -> str | None:
    """Why the installed FlashAttention-3, if any, cannot be called; imports it once."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "FlashAttention-3 (flash_attn_interface) is not installed"
    try:
        importlib.import_module("flash_attn_interface")
    except Exception as error:  # whatever a wheel for another PyTorch or CUDA fails with
        return f"cannot import flash_attn_interface ({type(error).__name__}: {error}); {_REMEDY}"
    wanted = {"fwd": _LENGTHS | _SCORES | {"num_splits"}}
    wanted["bwd"] = _LENGTHS | _SCORES | {"dq", "dk", "dv", "deterministic"}
    for name, named in wanted.items():
        operator = getattr(torch.ops.flash_attn_3, name, None)
        if operator is None:
            return f"finds flash_attn_interface without flash_attn_3::{name}; {_REMEDY}"
        arguments = operator.default._schema.arguments
        needed = {a.name for a in arguments if not a.has_default_value()}
        given = named | _TENSORS[name]
        if not needed <= given <= {a.name for a in arguments}:
            return f"finds a flash_attn_3::{name} of other arguments; {_REMEDY}"
    return None


def _build_refusals(inputs: AttentionInputs) -> Iterator[str]:
    """What was left out when the package was built, or that its kernels do not have."""
    head_dim = max(inputs.head_dim, inputs.value_dim)
    if head_dim > 192 and torch.are_deterministic_algorithms_enabled():
        yield f"is deterministic up to head_dim 192, got {head_dim}; {_REMEDY}"
    needed = ["BACKWARD", "VARLEN"]
    needed += ["FP16"] if inputs.dtype == torch.float16 else []
    needed += ["LOCAL"] if inputs.kind.window is not None else []
    needed += ["SOFTCAP"] if inputs.kind.softcap is not None else []
    missing = [part for part in needed if _is_disabled(f"FLASHATTENTION_DISABLE_{part}")]
    sizes = [n for n in _HEAD_DIMS if not _is_disabled(f"FLASHATTENTION_DISABLE_HDIM{n}")]
    if not any(head_dim <= size for size in sizes):
        missing.append(f"HDIM{min(n for n in _HEAD_DIMS if head_dim <= n)}")
    if missing:
        yield f"finds a FlashAttention-3 that was built without {', '.join(missing)}; {_REMEDY}"


def _is_disabled(flag: str) -> bool:
    """Whether the package was built with the flag; false where it does not say."""
    try:
        config = importlib.import_module("flash_attn_config").CONFIG
    except ImportError:
        return False
    return bool(config["build_flags"].get(flag, False))
