"""Packages of attention kernels that are not installed, with the signatures that they have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_pg.mcore.cpu.linear_kernels import stand_ins
from megatron_pg.mcore.cpu.mamba_kernels import GatedRMSNorm
from megatron_pg.mcore.cpu.mamba_kernels import stand_ins as mamba_stand_ins
from tests.attention.flash_rule import FLASH3_SCHEMAS
from tests.fake_h100.device import active


def install(package: str) -> None:
    """Let ``import`` find a package of kernels, in this process."""
    for name, content in _PACKAGES[package]().items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package="." not in name)
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Any, ...]:
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _launched("flash_attn.varlen_fwd")
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), lse, None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    assert dout.shape == out.shape == q.shape == dq.shape
    assert dk.shape == k.shape and dv.shape == v.shape
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
    _launched("flash_attn.varlen_bwd")
    return softmax_lse


def _check(q: Tensor, k: Tensor, v: Tensor, *cu_seqlens: Tensor) -> None:
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert all(x.is_cuda and x.stride(-1) == 1 for x in (q, k, v))
    assert all(x.is_cuda and x.dtype == torch.int32 for x in cu_seqlens)
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0 and q.shape[2] == k.shape[2]


def _launched(name: str) -> None:
    device = active()
    assert device is not None
    device.launched(name)


def _flash_attn() -> dict[str, dict[str, Any]]:
    functions = _flash_attn_varlen_forward, _flash_attn_varlen_backward
    return {
        "flash_attn": {"__version__": "2.8.3"},
        "flash_attn.flash_attn_interface": {f.__name__: f for f in functions},
    }


def _flash3() -> dict[str, dict[str, Any]]:
    library = torch.library.Library("flash_attn_3", "DEF")
    for name, function in (("fwd", _flash3_forward), ("bwd", _flash3_backward)):
        library.define(FLASH3_SCHEMAS[name])
        library.impl(name, function, "Meta")
    # Operators are there as long as it is.
    return {"flash_attn_interface": {"library": library}}


def _flash3_forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[2]), lse, q.new_empty(0), q.new_empty(0)


def _flash3_backward(dout: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(dout.new_empty(0) for _ in range(5))


class _Rule(torch.autograd.Function):
    """A scan over sequences side by side: outputs as values, a state each."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Any, num: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, g, beta)
        ctx.has_state = state is not None
        _launched("fla.gated_delta_rule_fwd")
        shape = (num, v.shape[2], k.shape[3], v.shape[3])
        return torch.empty_like(v), q.new_empty(shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dstate: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        _launched("fla.gated_delta_rule_bwd")
        grads = [torch.empty_like(x) for x in ctx.saved_tensors]
        return *grads, torch.empty_like(dstate) if ctx.has_state else None, None


def _chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    assert cu_seqlens is not None and chunk_indices is not None
    assert all(x.is_cuda and x.dtype == torch.int64 for x in (cu_seqlens, chunk_indices))
    assert all(x.is_cuda and x.is_contiguous() for x in (q, k, v, g, beta))
    assert q.dtype == k.dtype == v.dtype == beta.dtype == torch.bfloat16
    assert g.dtype == torch.float32 and g.shape == beta.shape == q.shape[:3]
    num = len(cu_seqlens) - 1
    if initial_state is not None:
        assert initial_state.dtype == torch.float32
        assert initial_state.shape == (num, v.shape[2], k.shape[3], v.shape[3])
    out, state = _Rule.apply(q, k, v, g, beta, initial_state, num)
    return out, state if output_final_state else None


class _Launch(torch.autograd.Function):
    """A kernel whose result is like its first argument."""

    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, *others: Tensor) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(x, *others)
        _launched(f"{name}_fwd")
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        _launched(f"{ctx.name}_bwd")
        return None, *(torch.empty_like(x) for x in ctx.saved_tensors)


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> tuple[Tensor, None]:
    assert x.is_cuda and bias is None and activation == "silu" and len(weight) == x.shape[2]
    return _Launch.apply("fla.causal_conv1d", x, weight), None


def _fla() -> dict[str, dict[str, Any]]:
    def l2norm(x: Tensor) -> Tensor:
        assert x.is_cuda and x.is_contiguous()
        normed: Tensor = _Launch.apply("fla.l2norm", x)
        return normed

    kernels = {
        "l2norm": l2norm,
        "causal_conv1d": _causal_conv1d,
        "chunk_gated_delta_rule": _chunk_gated_delta_rule,
    }
    # Megatron-Core has asked for them already.
    for module, name, _ in stand_ins():
        setattr(module, name, kernels.get(name, True))
    return {"fla": {}}


def _chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor]:
    given = [x, dt, A, B, C, D]
    assert all(y.is_cuda and y.is_contiguous() for y in given) and return_final_states
    assert x.dtype == B.dtype == C.dtype == torch.bfloat16 and dt.dtype == torch.float32
    assert dt.shape == x.shape[:3] and B.shape == C.shape and x.shape[2] % B.shape[2] == 0
    shape = (len(x), *x.shape[2:], B.shape[3])
    if initial_states is not None:
        assert initial_states.shape == shape and initial_states.dtype == torch.float32
        given.append(initial_states)
    scanned: tuple[Tensor, Tensor] = _ChunkScan.apply(shape, *given)
    return scanned


class _ChunkScan(torch.autograd.Function):
    """Outputs as the first tensor, and states of a shape."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *others)
        _launched("mamba.chunk_scan_fwd")
        return torch.empty_like(x), x.new_empty(shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dstate: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        _launched("mamba.chunk_scan_bwd")
        return None, *(torch.empty_like(x) for x in ctx.saved_tensors)


class _GatedNorm(GatedRMSNorm):
    """Of one kernel."""

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert z is not None and x.is_cuda and x.dtype == z.dtype == torch.bfloat16
        normed: Tensor = _Launch.apply("mamba.gated_norm", x, z, self.weight)
        return normed


def _columns_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    assert x.is_cuda and bias is not None and activation == "silu" and len(weight) == x.shape[1]
    convolved: Tensor = _Launch.apply("causal_conv1d", x, weight, bias)
    return convolved


def _mamba_ssm() -> dict[str, dict[str, Any]]:
    from megatron.core.ssm import mamba_mixer

    # Megatron-Core has asked for them already.
    for module, name, stand_in in mamba_stand_ins():
        setattr(module, name, stand_in)
    mamba_mixer.ExtendedRMSNorm = _GatedNorm
    mamba_mixer.mamba_chunk_scan_combined = _chunk_scan
    mamba_mixer.causal_conv1d_fn = _columns_conv1d
    return {"mamba_ssm": {}}


_PACKAGES: dict[str, Callable[[], dict[str, dict[str, Any]]]] = {
    "fla": _fla,
    "flash_attn": _flash_attn,
    "flash3": _flash3,
    "mamba_ssm": _mamba_ssm,
}
