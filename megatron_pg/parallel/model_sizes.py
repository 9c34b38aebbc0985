"""What of a model parallel ranks divide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from .split import PipelineSplit


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """What of a model is divided over ranks.

    Attributes:
        num_attention_heads: query heads.
        num_query_groups: key and value heads.
        num_layers: None where they are not cut into equal stages.
        widths: what tensor parallelism divides beside heads, by name.
        expert_widths: what expert tensor parallelism divides, by name.
        num_moe_experts: None without experts.
    """

    num_attention_heads: int
    num_query_groups: int
    num_layers: int | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    expert_widths: Mapping[str, int] = field(default_factory=dict)
    num_moe_experts: int | None = None

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Of a ``TransformerConfig``."""
        widths, expert_widths = {"ffn_hidden_size": config.ffn_hidden_size}, {}
        if config.num_moe_experts:
            expert_widths["moe_ffn_hidden_size"] = (
                config.moe_ffn_hidden_size or config.ffn_hidden_size
            )
            if config.moe_layer_freq == 1:
                widths = {}
            if shared := config.moe_shared_expert_intermediate_size:
                widths["moe_shared_expert_intermediate_size"] = shared
        # A hybrid deals its layers out by the marks in its pattern.
        is_even = PipelineSplit.from_config(config).is_even and not getattr(
            config, "is_hybrid_model", False
        )
        return cls(
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups or config.num_attention_heads,
            num_layers=config.num_layers if is_even else None,
            widths=widths,
            expert_widths=expert_widths,
            num_moe_experts=config.num_moe_experts,
        )
