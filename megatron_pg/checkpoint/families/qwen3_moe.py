"""Qwen3-MoE: Qwen3 with experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    ExpertsModel,
    WindowInEveryLayer,
    kind_of_experts,
    pattern_of_sparse_step,
    register,
    sparse_step_json,
)


@register("Qwen3MoeForCausalLM", "qwen3_moe")
@dataclass(frozen=True, kw_only=True)
class Qwen3Moe(ExpertsModel):
    """As ``ExpertsModel``, with norms of queries and keys."""

    qk_layernorm = True
    windows = WindowInEveryLayer(switch=True)

    @classmethod
    def read_normalisation(cls, values: ConfigValues) -> bool:
        """See ``ExpertsModel``."""
        return values.flag("norm_topk_prob")

    @classmethod
    def read_pattern(cls, values: ConfigValues, num_layers: int) -> tuple[int, ...]:
        """See ``ExpertsModel``."""
        return pattern_of_sparse_step(values, num_layers)

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        keys = dict(norm_topk_prob=self.norm_topk_prob) | sparse_step_json(self)
        return super().config_json() | keys

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        return kind_of_experts(read) == "own"
