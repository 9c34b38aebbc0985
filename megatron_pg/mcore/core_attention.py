"""Core attention of a layer: prefix-grouped for packed groups, the given one for all else."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..attention import (
    AttentionInputs,
    check_softmax_scale,
    prefix_grouped_attention,
    select_backend,
)
from .generation import DecodeSeqParams, PrefillSeqParams
from .params import PositionedSeqParams, WrappedRow


class AttentionCalls(NamedTuple):
    """How many core-attention calls ran prefix-grouped and how many ran the given module.

    A layer that is recomputed counts its forward again; ``generate`` counts as prefix-grouped.
    """

    prefix_grouped: int
    ordinary: int


class PrefixGroupedCoreAttention(torch.nn.Module):
    """Mixin over a core attention class with ``DotProductAttention``'s constructor and call.

    Raises:
        ValueError: if no backend can run the model's packed groups on this machine.
    """

    attention_backend: str
    config: Any

    def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any):
        super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
        select_backend(_inputs_of(self.config), self.attention_backend)
        if softmax_scale is not None:
            check_softmax_scale(softmax_scale)
        self.prefix_grouped_softmax_scale = softmax_scale
        self.num_prefix_grouped_calls = 0
        self.num_ordinary_calls = 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[T, 1, num_heads * head_dim]`` for packed groups, else what the given module gives.

        Args:
            query: ``[T, 1, num_heads, head_dim]`` of this tensor-parallel rank.
            key: ``[T, 1, num_query_groups, head_dim]`` of this rank.
            value: as key.
            attention_mask: for ordinary batches; a packed row's visibility is its layout's.
            attn_mask_type: for ordinary batches.
            attention_bias: must be None for packed groups.
            packed_seq_params: ``WrappedRow`` of packed groups, from the layer's self-attention.
            kwargs: what the given module's call takes beyond these.

        Raises:
            NotImplementedError: if a packed row comes from a self-attention that is not wrapped,
                or with an attention bias.
        """
        if not isinstance(packed_seq_params, PositionedSeqParams | WrappedRow):
            self.num_ordinary_calls += 1
            given: Tensor = super().forward(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
            return given
        if attention_bias is not None:
            raise NotImplementedError(
                "attention_bias (alibi, relative positions) is not supported for packed groups; "
                "pass attention_bias=None"
            )
        if isinstance(packed_seq_params, PositionedSeqParams):
            raise NotImplementedError(
                "core attention got a packed row from a self-attention that is not wrapped; wrap "
                "the layer's whole spec by with_prefix_grouped_attention"
            )
        self.num_prefix_grouped_calls += 1
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        scale = self.prefix_grouped_softmax_scale
        params: Any = packed_seq_params.params
        if isinstance(params, DecodeSeqParams):
            out = params.cache.attend(self, query, key, value, scale)
        else:
            if params.prefix_kv is not None:
                key, value = params.prefix_kv.keep(self, key, value)
            out = prefix_grouped_attention(
                query,
                key,
                value,
                params.plan,
                softmax_scale=scale,
                backend=self.attention_backend,
                resident=[kept.of(self) for kept in params.resident],
            )
        if isinstance(params, PrefillSeqParams):
            params.cache.store_prompts(self, key, value)
        return out.reshape(out.shape[0], 1, -1)


def _inputs_of(config: TransformerConfig) -> AttentionInputs:
    """What attention of the model will be given; Megatron runs on CUDA wherever there is one."""
    device, dtype = torch.device("cpu"), config.params_dtype
    if config.bf16 or config.fp16:
        dtype = torch.bfloat16 if config.bf16 else torch.float16
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        # Models that are made in fp32 are cast before they run packed groups there.
        dtype = dtype if dtype.itemsize == 2 else torch.bfloat16
    return AttentionInputs(
        device,
        dtype,
        config.kv_channels,
        config.num_attention_heads,
        config.num_query_groups or config.num_attention_heads,
    )


@cache
def prefix_grouped_core_attention(cls: type, attention_backend: str) -> type:
    """Subclass of a core attention class that runs packed groups on ``attention_backend``."""
    return type(
        f"PrefixGrouped{cls.__name__}",
        (PrefixGroupedCoreAttention, cls),
        {"attention_backend": attention_backend},
    )


def count_attention_calls(model: torch.nn.Module) -> AttentionCalls:
    """Calls so far over all layers of a model (or of a list's modules, summed by the caller).

    Trust in the fast path: after a step on packed groups ``ordinary`` has not grown.
    """
    cores = [m for m in model.modules() if isinstance(m, PrefixGroupedCoreAttention)]
    return AttentionCalls(
        prefix_grouped=sum(core.num_prefix_grouped_calls for core in cores),
        ordinary=sum(core.num_ordinary_calls for core in cores),
    )
