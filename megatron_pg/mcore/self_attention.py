"""Self-attention of a layer: positions by the layout, everything else as given."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .params import PositionedSeqParams
from .validate import validate_config


class PrefixGroupedSelfAttention(torch.nn.Module):
    """Mixin over a ``SelfAttention`` class; ordinary batches go through it untouched."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        validate_config(config)
        super().__init__(config, *args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the given class, rotary rows gathered by logical position for packed groups."""
        if isinstance(packed_seq_params, PositionedSeqParams):
            if kwargs.get("inference_context") is not None:
                raise NotImplementedError(
                    "packed groups take no inference_context; sample with mcore.generate"
                )
            self._check_row(hidden_states, packed_seq_params)
            rotary_pos_emb = packed_seq_params.gather_rotary(rotary_pos_emb)
        return super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    def _check_row(self, hidden_states: Tensor, params: PositionedSeqParams) -> None:
        tokens, batch = hidden_states.shape[:2]
        if self.config.sequence_parallel:
            tokens *= self.config.tensor_model_parallel_size
        if batch != 1 or tokens != len(params.position_ids):
            raise ValueError(
                f"the model was given {batch} row(s) of {tokens} tokens, the layout describes one "
                f"row of {len(params.position_ids)}; feed tokens[None] of the same microbatch"
            )


@cache
def prefix_grouped_self_attention(cls: type) -> type:
    """Subclass of a ``SelfAttention`` class that places packed groups by their layout."""
    return type(f"PrefixGrouped{cls.__name__}", (PrefixGroupedSelfAttention, cls), {})
