"""Mixtral: Mistral's layers with experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    ExpertNames,
    ExpertsModel,
    WindowInEveryLayer,
    kind_of_experts,
    register,
)


@register("MixtralForCausalLM", "mixtral")
@dataclass(frozen=True, kw_only=True)
class Mixtral(ExpertsModel):
    """As ``ExpertsModel``; an expert is as wide as an MLP would be, in every layer."""

    default_rotary_base = 1e6
    windows = WindowInEveryLayer()
    names = ExpertNames(block="block_sparse_moe.", mlp=("w1", "w3", "w2"))
    keys = ("num_local_experts", "num_experts_per_tok", "intermediate_size")

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        # Training with transformers would shake what routers see.
        values.must("router_jitter_noise", 0.0, None)
        return super().read_config(values)

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        return kind_of_experts(read) == "plain"
