"""Qwen2-MoE (Qwen1.5-MoE): Qwen2 with experts, one of which every token goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    GatedExpertsModel,
    WindowBySwitch,
    kind_of_experts,
    pattern_of_sparse_step,
    register,
    sparse_step_json,
)


@register("Qwen2MoeForCausalLM", "qwen2_moe")
@dataclass(frozen=True, kw_only=True)
class Qwen2Moe(GatedExpertsModel):
    """As ``GatedExpertsModel``, with biases of queries, keys and values."""

    windows = WindowBySwitch()

    @property
    def add_qkv_bias(self) -> bool:
        """Always."""
        return True

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        values.must("qkv_bias", True)
        return super().read_config(values)

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
        keys = dict(norm_topk_prob=self.norm_topk_prob, qkv_bias=True) | sparse_step_json(self)
        return super().config_json() | keys

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        return kind_of_experts(read) == "gated"
