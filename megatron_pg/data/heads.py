"""Heads of a model's attention, whichever kind it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSizes:
    """What attention of every layer is given.

    Attributes:
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: of queries and keys.
        value_dim: of values.
        latent_dim: what latent attention makes keys and values of, per token; 0 for any other.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    latent_dim: int = 0

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Of a ``TransformerConfig``."""
        heads = config.num_attention_heads
        if getattr(config, "multi_latent_attention", False):
            # Every head has keys of its own, half positions that all of them share.
            return cls(
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=config.qk_head_dim + config.qk_pos_emb_head_dim,
                value_dim=config.v_head_dim,
                latent_dim=config.kv_lora_rank + config.qk_pos_emb_head_dim,
            )
        return cls(
            num_heads=heads,
            num_kv_heads=config.num_query_groups or heads,
            head_dim=config.kv_channels,
            value_dim=config.kv_channels,
        )
