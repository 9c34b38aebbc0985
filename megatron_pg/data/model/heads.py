"""Sizes of a model's attention, whichever kind it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSizes:
    """Heads of a layer and what projects onto them.

    Attributes:
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: of a query and a key.
        value_dim: of a value.
        q_lora_rank: width between the two query projections; None where there is one.
        kv_lora_rank: width of the latent that keys and values are projected from; None where they
            come from the hidden states.
        rotary_dim: part of a key that all heads share; latent attention only.
        has_output_gate: whether a gate for what attention returns is projected with the queries.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    rotary_dim: int = 0
    has_output_gate: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Of a ``TransformerConfig``."""
        heads = config.num_attention_heads
        if getattr(config, "multi_latent_attention", False):
            return cls(
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=config.qk_head_dim + config.qk_pos_emb_head_dim,
                value_dim=config.v_head_dim,
                q_lora_rank=config.q_lora_rank,
                kv_lora_rank=config.kv_lora_rank,
                rotary_dim=config.qk_pos_emb_head_dim,
            )
        return cls(
            num_heads=heads,
            num_kv_heads=config.num_query_groups or heads,
            head_dim=config.kv_channels,
            value_dim=config.kv_channels,
            has_output_gate=bool(getattr(config, "attention_output_gate", False)),
        )

    @property
    def kv_latent_dim(self) -> int:
        """Of latent attention, what a token's keys and values are made of; 0 for any other."""
        return self.kv_lora_rank + self.rotary_dim if self.kv_lora_rank else 0

    @property
    def latent_dim(self) -> int:
        """Values of one token between projections."""
        return (self.q_lora_rank or 0) + self.kv_latent_dim

    def kept_dim(self, tp_size: int, sequence_parallel: bool) -> int:
        """Values that a rank keeps of a token of a resident prompt in one layer.

        Keys and values of its heads; of latent attention the latent, which sequence parallelism
        divides, and the part of the key that all heads share.
        """
        if self.kv_lora_rank:
            shards = tp_size if sequence_parallel else 1
            return self.kv_lora_rank // shards + self.rotary_dim
        return max(self.num_kv_heads // tp_size, 1) * (self.head_dim + self.value_dim)

    def down_parameters(self, hidden_size: int) -> int:
        """Parameters of the projections onto latents."""
        return hidden_size * self.latent_dim

    def parameters(self, hidden_size: int) -> int:
        """Parameters of all projections of one layer, norms between them left out."""
        q = self.num_heads * self.head_dim * (self.q_lora_rank or hidden_size)
        q *= 2 if self.has_output_gate else 1
        out = self.num_heads * self.value_dim * hidden_size
        per_head = self.head_dim - self.rotary_dim + self.value_dim
        kv = self.num_kv_heads * per_head * (self.kv_lora_rank or hidden_size)
        return self.down_parameters(hidden_size) + q + kv + out
