"""Qwen3.5's text models with experts, one of which every token goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    GatedExpertsModel,
    kind_of_experts,
    register,
)
from .qwen3_5 import Qwen3_5


@register("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text")
@dataclass(frozen=True, kw_only=True)
class Qwen3_5Moe(Qwen3_5, GatedExpertsModel):
    """As its parts; all layers have experts, and no file has the width of an MLP."""

    ffn_key = "moe_intermediate_size"

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        values.must("norm_topk_prob", True)
        values.must("mlp_only_layers", [], None)
        values.must("decoder_sparse_step", 1)
        # Of no layer.
        values.known.add("intermediate_size")
        return super().read_config(values)

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``; Qwen3-Next with experts in all layers has the same."""
        return kind_of_experts(read) == "linear"

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_arguments(read)
        if fields["moe_layer_freq"] is not None:
            read.refuse("moe_layer_freq", read.get("moe_layer_freq"), "1 for every layer")
        # What Megatron-LM has as the width of an MLP is that of no layer.
        return fields | dict(ffn_hidden_size=fields["moe_ffn_hidden_size"])
