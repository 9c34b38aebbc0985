"""Llama, and what is stored as it (SmolLM2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import ArgumentValues, ConfigValues, HfModel, register


@register("LlamaForCausalLM", "llama")
@dataclass(frozen=True, kw_only=True)
class Llama(HfModel):
    """Biases in all linear layers, or in none."""

    own_defaults = ()

    @classmethod
    def read_bias(cls, values: ConfigValues) -> bool:
        """See ``HfModel``."""
        attention, mlp = values.flag("attention_bias"), values.flag("mlp_bias")
        if attention != mlp:
            values.refused.append("attention_bias and mlp_bias must both be true or both false")
        return attention

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        biases = dict(attention_bias=self.add_bias_linear, mlp_bias=self.add_bias_linear)
        return super().config_json() | biases

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """No experts, normalised queries, biases of queries, keys and values alone, windows."""
        has_bias = read.get("add_qkv_bias") and not read.get("add_bias_linear")
        others = "num_experts", "qk_layernorm", "window_size", "no_rope_freq"
        return not (has_bias or any(map(read.get, others)))
