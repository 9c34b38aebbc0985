"""Mistral: Llama's layers, without biases, and with a window in all of them or in none."""

from __future__ import annotations

from dataclasses import dataclass

from ..description import ArgumentValues, HfModel, WindowInEveryLayer, register


@register("MistralForCausalLM", "mistral")
@dataclass(frozen=True, kw_only=True)
class Mistral(HfModel):
    """A file without ``sliding_window`` has one of 4096, and there is no switch to it."""

    own_defaults = ("num_key_value_heads", "sliding_window")
    windows = WindowInEveryLayer()

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """Llama with a window."""
        others = "num_experts", "qk_layernorm", "add_bias_linear", "add_qkv_bias", "no_rope_freq"
        is_plain = read.get("softmax_type") in (None, "vanilla") and not any(map(read.get, others))
        return bool(read.get("window_size")) and is_plain
