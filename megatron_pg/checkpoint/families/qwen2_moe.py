"""Qwen2-MoE (Qwen1.5-MoE): Qwen2 with experts, one of which every token goes through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    ExpertNames,
    ExpertsModel,
    WindowBySwitch,
    kind_of_experts,
    pattern_of_sparse_step,
    register,
    sparse_step_json,
)

_SHARED = "shared_expert_intermediate_size"


@register("Qwen2MoeForCausalLM", "qwen2_moe")
@dataclass(frozen=True, kw_only=True)
class Qwen2Moe(ExpertsModel):
    """As ``ExpertsModel``, with biases of queries, keys and values and a gated shared expert."""

    windows = WindowBySwitch()
    names = ExpertNames(shared="shared_expert.")
    moe_shared_expert_gate = True

    moe_shared_expert_intermediate_size: int = field()

    @property
    def add_qkv_bias(self) -> bool:
        """Always."""
        return True

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        values.must("qkv_bias", True)
        return super().read_config(values) | dict(
            moe_shared_expert_intermediate_size=values.size(_SHARED),
        )

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
        shared = {_SHARED: self.moe_shared_expert_intermediate_size}
        keys = dict(norm_topk_prob=self.norm_topk_prob, qkv_bias=True) | sparse_step_json(self)
        return super().config_json() | keys | shared

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        return kind_of_experts(read) == "gated"

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        width = read.size("moe_shared_expert_intermediate_size")
        return super().read_arguments(read) | dict(moe_shared_expert_intermediate_size=width)
