"""Qwen3: queries and keys are normalised per head."""

from __future__ import annotations

from dataclasses import dataclass

from ..description import ArgumentValues, HfModel, WindowBySwitch, register


@register("Qwen3ForCausalLM", "qwen3")
@dataclass(frozen=True, kw_only=True)
class Qwen3(HfModel):
    """As ``HfModel``, with these norms; a file without ``head_dim`` has one of 128."""

    own_defaults = ("num_key_value_heads", "head_dim")
    qk_layernorm = True
    windows = WindowBySwitch()

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        is_linear = read.get("experimental_attention_variant") == "gated_delta_net"
        return bool(read.get("qk_layernorm") and not read.get("num_experts") and not is_linear)
