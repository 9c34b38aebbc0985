"""The public entry of prefix-grouped attention and the choice of its backend."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ..tree import PackedLayout
from .backends import ATTENTION_BACKENDS, AttentionBackend, AttentionInputs
from .plan import AttentionPlan, make_attention_plan
from .resident import ResidentKV


def prefix_grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | AttentionPlan,
    softmax_scale: float | None = None,
    backend: str = "auto",
    resident: Sequence[ResidentKV] = (),
) -> Tensor:
    """Attention of every sample over its own path in the tree, each shared token computed once.

    Equals causal attention over the written-out samples: for every sample i, rows
    ``layout.sample_indices(i)`` of the output are what causal attention gives on those rows of
    q, k and v; the gradient of a shared row is the sum over its samples. A padding row returns
    its own value.

    Args:
        q: ``[total_tokens, num_heads, head_dim]`` queries, positions already encoded.
        k: ``[total_tokens, num_kv_heads, head_dim]`` keys; num_heads is a multiple of
            num_kv_heads (GQA, MQA).
        v: ``[total_tokens, num_kv_heads, head_dim]`` values.
        layout: where every token stands, or a plan made from it once for many calls.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.
        backend: a name from ``available_backends()`` or "auto" (see ``select_backend``).
        resident: keys and values of the prefix rows that ``layout.resident_spans`` name. The
            backward pass adds to their ``dk`` and ``dv``.

    Returns:
        ``[total_tokens, num_heads, head_dim]``, differentiable once in q, k and v.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, a scale that is not finite or not
            above 0, or a backend that cannot take the inputs.

    Source: shared-prefix forward of Prefix Grouper (arXiv 2506.05433), generalised to trees.
    """
    if not isinstance(layout, PackedLayout | AttentionPlan):
        raise ValueError(
            f"layout is {type(layout).__name__}; pass what pack_trees or make_attention_plan gives"
        )
    total_tokens = (layout.layout if isinstance(layout, AttentionPlan) else layout).total_tokens
    _check_tensors(q, k, v, total_tokens)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    check_softmax_scale(softmax_scale)
    chosen = select_backend(AttentionInputs.of(q, k), backend)
    plan = layout if isinstance(layout, AttentionPlan) else make_attention_plan(layout, q.device)
    if plan.device != q.device:
        raise ValueError(
            f"the attention plan was made for {plan.device}, q is on {q.device}; "
            "pass device=q.device when it is made"
        )
    _check_resident(k, plan, resident)
    return chosen(q, k, v, plan, float(softmax_scale), resident)


def _check_resident(k: Tensor, plan: AttentionPlan, resident: Sequence[ResidentKV]) -> None:
    if len(resident) < plan.num_prefix_rows:
        raise ValueError(
            f"the layout continues {plan.num_prefix_rows} resident prefix row(s), {len(resident)} "
            "given; pass resident=, one per prefix row"
        )
    for p in plan.passes:
        if p.prefix_row is None:
            continue
        kept = resident[p.prefix_row]
        for name, x in (("keys", kept.k), ("values", kept.v)):
            fits = (x.shape[1:], x.dtype, x.device) == (k.shape[1:], k.dtype, k.device)
            if not fits or len(x) < p.kv_end:
                raise ValueError(
                    f"resident[{p.prefix_row}] holds {x.dtype} {name} of shape {tuple(x.shape)} on "
                    f"{x.device}; the row has {k.dtype} {name} of shape {tuple(k.shape)} on "
                    f"{k.device} and sees {p.kv_end} of its tokens"
                )
            if x.stride(-1) != 1:
                raise ValueError(
                    f"{name} of resident[{p.prefix_row}] have strides {x.stride()}, the last must "
                    "be 1; call contiguous()"
                )


def select_backend(inputs: AttentionInputs, backend: str = "auto") -> AttentionBackend:
    """The backend that will run: the one named, or the fastest that takes the inputs.

    "auto" never picks ``reference``, whose memory is quadratic: ask for it by name.

    Raises:
        ValueError: if the name is unknown or no backend takes the inputs, with every reason.
    """
    check_backend_name(backend)
    candidates = [backend]
    if backend == "auto":
        candidates = [name for name in ATTENTION_BACKENDS if name != "reference"]
    refusals = {}
    for name in candidates:
        refusals[name] = ATTENTION_BACKENDS[name].refusal(inputs)
        if refusals[name] is None:
            return ATTENTION_BACKENDS[name]
    reasons = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
    raise ValueError(
        f"no attention backend for {backend!r} takes these inputs: {reasons}. "
        "backend='reference' takes any (memory quadratic in the row)"
    )


def check_backend_name(backend: str) -> None:
    """Raise ValueError if the name is neither "auto" nor that of a backend."""
    if backend != "auto" and backend not in list(ATTENTION_BACKENDS):
        raise ValueError(
            f"attention backend {backend!r} is unknown; use 'auto' or one of "
            f"{', '.join(ATTENTION_BACKENDS)}"
        )


def check_softmax_scale(softmax_scale: float) -> None:
    """Raise ValueError unless the scale is a number that kernels take.

    They mask before they scale, so that hidden keys are seen with a factor of 0 or below.
    """
    is_number = isinstance(softmax_scale, numbers.Real)
    if not is_number or not math.isfinite(softmax_scale) or softmax_scale <= 0:
        raise ValueError(f"softmax_scale={softmax_scale!r} must be finite and above 0")


def available_backends(inputs: AttentionInputs | None = None) -> list[str]:
    """Names of the backends that can run, fastest first.

    Args:
        inputs: what they must take; by default bf16 with head_dim 64 on this machine's
            accelerator, or on the CPU where there is none.
    """
    if inputs is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        inputs = AttentionInputs(device, torch.bfloat16, 64, 1, 1)
    return [name for name, b in ATTENTION_BACKENDS.items() if b.refusal(inputs) is None]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, total_tokens: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, head_dim], got {tuple(x.shape)}")
        if x.shape[0] != total_tokens:
            raise ValueError(
                f"{name} has {x.shape[0]} tokens, the layout {total_tokens}; "
                "build the layout from the same groups (pad_to_multiple included)"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; they must agree"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q has dtype {q.dtype}, attention needs a floating-point type")
    if k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must have equal shapes and q's head_dim "
            f"{q.shape[2]}"
        )
    if 0 in (q.shape[1], q.shape[2], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q's {q.shape[1]} heads must be a multiple of the {k.shape[1]} heads of k and v, "
            f"none of them 0, and head_dim {q.shape[2]} at least 1"
        )
