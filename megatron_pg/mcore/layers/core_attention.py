"""Core attention of a layer: prefix-grouped for packed groups, the given one for all else."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cache
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from ...attention import (
    ATTENTION_BACKENDS,
    AttentionInputs,
    AttentionKind,
    ResidentKV,
    prefix_grouped_attention,
    select_backend,
)
from ...data import AttentionSizes
from ...tree import PackedLayout
from ..positioned import PositionedSeqParams, WrappedRow
from .rotary import turn_heads


class AttentionCalls(NamedTuple):
    """How many calls that mix tokens ran prefix-grouped and how many ran the given module.

    Of core attention, and of linear attention.

    A layer that is recomputed counts its forward again; ``generate`` counts as prefix-grouped.
    """

    prefix_grouped: int
    ordinary: int


class PrefixGroupedCoreAttention(torch.nn.Module):
    """Mixin over a core attention class with ``DotProductAttention``'s constructor and call.

    Attributes:
        attention_backend: by name, or "auto".
        backend_name: the backend that was chosen when the layer was built.
        kind: what the layer's attention computes.

    Raises:
        ValueError: if no backend can run the model's packed groups on this machine.
    """

    attention_backend: str
    config: Any
    softmax_offset: Any

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ):
        self.splits_rows = config.context_parallel_size > 1 and isinstance(
            self, DotProductAttention
        )
        if self.splits_rows:
            # It knows no context parallelism and refuses to be built under it. Of packed rows it
            # gets whole ones, with a part of the heads.
            config = copy(config)
            config.context_parallel_size = 1
        super().__init__(config, layer_number, *args, softmax_scale=softmax_scale, **kwargs)
        # The given module may have made a configuration of its own.
        heads = AttentionSizes.from_config(self.config)
        self.kind = AttentionKind(
            softmax_scale=softmax_scale,
            window=_layer_window(self.config, layer_number),
            has_sink=self.config.softmax_type != "vanilla",
            value_dim=heads.value_dim,
        )
        inputs = _inputs_of(self.config, heads, self.kind)
        self.backend_name = select_backend(inputs, self.attention_backend).name
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
        """``[T, 1, num_heads * value_dim]`` for packed groups, else what the given module gives.

        Args:
            query: ``[T, 1, num_heads, head_dim]`` of this tensor-parallel rank; without the 1 too.
            key: ``[T, 1, num_query_groups, head_dim]`` of this rank.
            value: ``[T, 1, num_query_groups, value_dim]``.
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
            if self.splits_rows:
                raise NotImplementedError(
                    f"an ordinary batch under context parallelism in {type(self).__name__}, which "
                    "attends to the tokens of its own rank alone; feed packed rows, or build the "
                    "model from a Transformer Engine spec"
                )
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
        if packed_seq_params.rotary is not None:
            turning = packed_seq_params.params.rotary.cos_and_sin(
                packed_seq_params.rotary, query.dtype
            )
            query, key = turn_heads(query, *turning), turn_heads(key, *turning)
        # Latent attention has left the batch dimension out.
        query, key, value = (x.reshape(len(x), *x.shape[-2:]) for x in (query, key, value))
        out = packed_seq_params.attend(self, query, key, value)
        return out.reshape(out.shape[0], 1, -1)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackedLayout,
        resident: Sequence[ResidentKV],
        heads: slice = slice(None),
    ) -> Tensor:
        """``prefix_grouped_attention`` of this layer's kind, on the backend that was chosen.

        ``heads`` are those of ``query`` among this tensor-parallel rank's.
        """
        sink = self.sink(query.device)
        return prefix_grouped_attention(
            query,
            key,
            value,
            layout,
            backend=ATTENTION_BACKENDS[self.backend_name],
            resident=resident,
            kind=self.kind,
            sink=None if sink is None else sink[heads],
        )

    def sink(self, device: torch.device) -> Tensor | None:
        """``[heads of this rank]`` logits that take weight and have no value; None without.

        Learned by the given module, or its zeros, which no move of the module moves.
        """
        return self.softmax_offset.flatten().to(device) if self.kind.has_sink else None


def layer_windows(config: TransformerConfig) -> list[int | None]:
    """Of every layer of the whole model, keys that a query sees before itself; None sees all."""
    return [_layer_window(config, number) for number in range(1, config.num_layers + 1)]


def _layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    window_size: Any = config.window_size
    has_window = is_layer_window_attention(window_size, config.window_attn_skip_freq, layer_number)
    return int(window_size[0]) if has_window else None


def _inputs_of(
    config: TransformerConfig, heads: AttentionSizes, kind: AttentionKind
) -> AttentionInputs:
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
        heads.head_dim,
        heads.num_heads,
        heads.num_kv_heads,
        kind,
    )


@cache
def prefix_grouped_core_attention(cls: type, attention_backend: str) -> type:
    """Subclass of a core attention class that runs packed groups on ``attention_backend``."""
    return type(
        f"PrefixGrouped{cls.__name__}",
        (PrefixGroupedCoreAttention, cls),
        {"attention_backend": attention_backend},
    )


def attention_backends(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the backends that run packed groups in the layers of a model, each once."""
    cores = (m for m in model.modules() if isinstance(m, PrefixGroupedCoreAttention))
    return tuple(sorted({core.backend_name for core in cores}))


def count_attention_calls(model: torch.nn.Module) -> AttentionCalls:
    """Calls so far over all layers of a model (or of a list's modules, summed by the caller).

    Trust in the fast path: after a step on packed groups ``ordinary`` has not grown.
    """
    cores: list[Any] = [m for m in model.modules() if hasattr(m, "num_prefix_grouped_calls")]
    return AttentionCalls(
        prefix_grouped=sum(core.num_prefix_grouped_calls for core in cores),
        ordinary=sum(core.num_ordinary_calls for core in cores),
    )
