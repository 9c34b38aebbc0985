"""Self-attention of a layer: positions by the layout, everything else as given."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from ..positioned import PositionedSeqParams, WrappedRow
from ..validate import validate_config
from .core_attention import PrefixGroupedCoreAttention
from .rotary import turns_by_row
from .row import check_row


class PrefixGroupedSelfAttention(torch.nn.Module):
    """Mixin over a ``SelfAttention`` class; ordinary batches go through it untouched."""

    config: Any
    core_attention: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        validate_config(config)
        super().__init__(config, *args, **kwargs)
        self.wrapped_core()
        mask_type: Any = self.attn_mask_type
        if mask_type is not AttnMaskType.causal:
            raise ValueError(
                f"attn_mask_type={mask_type} of {type(self).__name__}: attention of packed groups "
                'is causal; set params={"attn_mask_type": AttnMaskType.causal} in the spec'
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the given class, rotary rows gathered by logical position for packed groups.

        Raises:
            ValueError: if the row is not the layout's.
            NotImplementedError: with an ``inference_context``, or if the given class does not hand
                packed rows to a wrapped core attention.
        """
        is_packed = isinstance(packed_seq_params, PositionedSeqParams)
        if is_packed:
            check_row(self.config, hidden_states, packed_seq_params, **kwargs)
            table = packed_seq_params.gather_rotary(rotary_pos_emb)
            packed_seq_params = self.wrapped_row(packed_seq_params)
            if turns_by_row(self, super().forward, rotary_pos_emb):
                packed_seq_params = replace(packed_seq_params, rotary=rotary_pos_emb)
                table = None
            rotary_pos_emb = table
            core = self.wrapped_core()
            num_calls = core.num_prefix_grouped_calls
        output = super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        if is_packed and core.num_prefix_grouped_calls == num_calls:
            raise NotImplementedError(
                f"{type(self).__name__} did not hand packed_seq_params on to its core attention, "
                "which then attends across samples; hand it on, as SelfAttention.forward does"
            )
        return output

    def wrapped_row(self, params: PositionedSeqParams) -> WrappedRow:
        """What the given class and the core attention get in the place of a row's params."""
        return WrappedRow(params)

    def wrapped_core(self) -> PrefixGroupedCoreAttention:
        """The layer's core attention.

        Raises:
            NotImplementedError: if another one has been put in the place of the wrapped one.
        """
        core: Any = self.core_attention
        if not isinstance(core, PrefixGroupedCoreAttention):
            raise NotImplementedError(
                f"core_attention of {type(self).__name__} is {type(core).__name__}, which was put "
                "there after with_prefix_grouped_attention; wrap the spec last"
            )
        return core


@cache
def prefix_grouped_self_attention(cls: type) -> type:
    """Subclass of a ``SelfAttention`` class that places packed groups by their layout."""
    return type(f"PrefixGrouped{cls.__name__}", (PrefixGroupedSelfAttention, cls), {})
