"""Gemma 3's text models: norms around attention and MLP, windows with positions of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.activations import fast_gelu

from ..description import (
    ArgumentValues,
    ConfigValues,
    HfModel,
    WindowByPeriod,
    layer_ropes_json,
    read_layer_ropes,
    register,
)


@register("Gemma3ForCausalLM", "gemma3_text")
@dataclass(frozen=True, kw_only=True)
class Gemma3(HfModel):
    """As ``HfModel``, of ``mcore.DecoderConfig``; its norms multiply by one plus their weight.

    Attributes:
        query_pre_attn_scalar: scores are divided by its root.
        window_rotary_base: of positions in layers with a window.
    """

    hidden_act = ("hidden_activation", "gelu_pytorch_tanh")
    own_defaults = ("num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window")
    own_tied = True
    qk_layernorm = True
    layer_norms = {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
        "pre_mlp_layernorm": "pre_feedforward_layernorm",
        "mlp.linear_fc2.post_layernorm": "post_feedforward_layernorm",
    }
    windows = WindowByPeriod(6, key="sliding_window_pattern")

    query_pre_attn_scalar: int = 256
    window_rotary_base: float = 10000.0

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            values.must(key, None)
        values.must("use_bidirectional_attention", False, None)
        values.get("cache_implementation")
        scalar = values.size("query_pre_attn_scalar", default=256)
        return super().read_config(values) | dict(query_pre_attn_scalar=scalar)

    @classmethod
    def read_positions(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        return read_layer_ropes(values, (1000000.0, 10000.0))

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        config = super().config_json() | dict(query_pre_attn_scalar=self.query_pre_attn_scalar)
        return layer_ropes_json(config, self.window_rotary_base)

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().read_arguments(read) | dict(
            query_pre_attn_scalar=round(read.number("softmax_scale") ** -2),
            window_rotary_base=read.number("hf_window_rotary_base"),
        )

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().megatron_arguments() | dict(
            swiglu=False,
            apply_layernorm_1p=True,
            softmax_scale=self.query_pre_attn_scalar**-0.5,
            hf_window_rotary_base=self.window_rotary_base,
        )

    def transformer_config(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().transformer_config() | dict(
            activation_func=fast_gelu,
            embedding_multiplier=self.hidden_size**0.5,
            has_post_layernorms=True,
            layernorm_zero_centered_gamma=True,
            softmax_scale=self.query_pre_attn_scalar**-0.5,
            window_rotary_base=self.window_rotary_base,
        )
