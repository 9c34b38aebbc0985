"""The public entry of prefix-grouped attention and the choice of its backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tree import PackedLayout
from .backends import ATTENTION_BACKENDS, AttentionBackend, AttentionInputs
from .kernels import merge_implementation
from .kinds import AttentionKind
from .plan import make_attention_plan
from .resident import ResidentKV


def prefix_grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    softmax_scale: float | None = None,
    backend: str | AttentionBackend = "auto",
    resident: Sequence[ResidentKV] = (),
    kind: AttentionKind | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention of every sample over its own path in the tree, each shared token computed once.

    Equals causal attention over the written-out samples: for every sample i, rows
    ``layout.sample_indices(i)`` of the output are what causal attention gives on those rows of
    q, k and v; the gradient of a shared row is the sum over its samples. A padding row returns
    its own value. What a backend makes of the layout is made by the first call and kept with it.

    Args:
        q: ``[total_tokens, num_heads, head_dim]`` queries, positions already encoded.
        k: ``[total_tokens, num_kv_heads, head_dim]`` keys; num_heads is a multiple of
            num_kv_heads (GQA, MQA).
        v: ``[total_tokens, num_kv_heads, value_dim]`` values, of head_dim unless ``kind`` says
            otherwise.
        layout: where every token stands.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.
        backend: a name from ``available_backends()``, "auto" (see ``select_backend``), or what
            ``select_backend`` gave.
        resident: keys and values of the prefix rows that ``layout.resident_spans`` name. The
            backward pass adds to their ``dk`` and ``dv``.
        kind: window, sink, softcap or value size of the layer, in place of ``softmax_scale``.
        sink: ``[num_heads]`` logits, exactly when ``kind.has_sink``.

    Returns:
        ``[total_tokens, num_heads, value_dim]``, differentiable once in q, k, v and sink.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, a scale that is not finite or not
            above 0, or a backend that cannot take the inputs.

    Source: shared-prefix forward of Prefix Grouper (arXiv 2506.05433), generalised to trees.
    """
    if not isinstance(layout, PackedLayout):
        raise ValueError(f"layout is {type(layout).__name__}; pass what pack_trees gives")
    if kind is None:
        kind = AttentionKind(softmax_scale=softmax_scale)
    elif softmax_scale is not None:
        raise ValueError(f"softmax_scale={softmax_scale} beside {kind}; say it in the kind alone")
    _check_tensors(q, k, v, layout.total_tokens, kind)
    _check_sink(q, sink, kind)
    inputs = AttentionInputs.of(q, k, kind)
    if not isinstance(backend, AttentionBackend):
        backend = select_backend(inputs, backend)
    elif (reason := backend.refusal(inputs)) is not None:
        raise ValueError(
            f"attention backend {backend.name!r}, chosen before, {reason}; choose it for the "
            "device and dtype that it is called with (a model: build it with those)"
        )
    _check_resident(k, v, layout, resident)
    prepared = _prepared(layout, backend, q.device, kind)
    return backend(q, k, v, prepared, kind, sink, resident)


def _prepared(
    layout: PackedLayout, backend: AttentionBackend, device: torch.device, kind: AttentionKind
) -> object:
    """What the backend makes of the row: once for all kinds that see the same keys."""
    return layout.derived(
        (backend, device, kind.window),
        lambda: backend.prepare(make_attention_plan(layout, kind.window), device),
    )


def _check_sink(q: Tensor, sink: Tensor | None, kind: AttentionKind) -> None:
    if kind.has_sink != (sink is not None):
        raise ValueError(
            f"has_sink={kind.has_sink} of the kind, sink {'given' if sink is not None else 'None'}"
            "; a sink takes AttentionKind(has_sink=True) and sink="
        )
    if sink is not None and (sink.shape != q.shape[1:2] or sink.device != q.device):
        raise ValueError(
            f"sink has shape {tuple(sink.shape)} on {sink.device}, must be one number for each of "
            f"q's {q.shape[1]} heads on {q.device}"
        )


def _check_resident(
    k: Tensor, v: Tensor, layout: PackedLayout, resident: Sequence[ResidentKV]
) -> None:
    num_rows = 1 + max((spans.row for spans in layout.resident_spans), default=-1)
    if len(resident) < num_rows:
        raise ValueError(
            f"the layout continues {num_rows} resident prefix row(s), {len(resident)} "
            "given; pass resident=, one per prefix row"
        )
    for spans in layout.resident_spans:
        kept, kv_end = resident[spans.row], int(spans.kv_spans[-1, 1])
        for name, x, own in (("keys", kept.k, k), ("values", kept.v, v)):
            fits = (x.shape[1:], x.dtype, x.device) == (own.shape[1:], own.dtype, own.device)
            if not fits or len(x) < kv_end:
                raise ValueError(
                    f"resident[{spans.row}] holds {x.dtype} {name} of shape {tuple(x.shape)} on "
                    f"{x.device}; the row has {own.dtype} {name} of shape {tuple(own.shape)} on "
                    f"{own.device} and sees {kv_end} of its tokens"
                )
            if x.stride(-1) != 1:
                raise ValueError(
                    f"{name} of resident[{spans.row}] have strides {x.stride()}, the last must "
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


def describe_backend(name: str, device: torch.device | str) -> str:
    """A backend with what runs under its name on the device: ``flash, FA3, triton merge``.

    Args:
        name: of a backend, as ``select_backend`` chose it.
        device: of the layer's tensors.
    """
    backend = ATTENTION_BACKENDS[name]
    merge = f"{merge_implementation(device)} merge" if backend.merges else None
    return ", ".join(part for part in (name, backend.kernels(), merge) if part)


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


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, total_tokens: int, kind: AttentionKind) -> None:
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
    value_dim = q.shape[2] if kind.value_dim is None else kind.value_dim
    if kind.value_dim is not None and v.shape[2] != value_dim:
        raise ValueError(
            f"v has heads of {v.shape[2]}, AttentionKind(value_dim={value_dim}) of {value_dim}; "
            "they must agree"
        )
    if k.shape[1] != v.shape[1] or k.shape[2] != q.shape[2] or v.shape[2] != value_dim:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must have equal shapes and q's head_dim "
            f"{q.shape[2]}; values of another size take AttentionKind(value_dim=...)"
        )
    if 0 in (q.shape[1], q.shape[2], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q's {q.shape[1]} heads must be a multiple of the {k.shape[1]} heads of k and v, "
            f"none of them 0, and head_dim {q.shape[2]} at least 1"
        )
