"""Olmo 3: norms behind attention and MLP alone, and queries and keys normalised over all heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    HfModel,
    WindowByPeriod,
    layer_ropes_json,
    read_layer_ropes,
    register,
)
from ..table import Row, outputs


@register("Olmo3ForCausalLM", "olmo3")
@dataclass(frozen=True, kw_only=True)
class Olmo3(HfModel):
    """As ``HfModel``, of ``mcore.DecoderConfig``; YaRN scales layers without a window alone.

    Attributes:
        window_rotary_base: of positions in layers with a window.
    """

    own_defaults = ("sliding_window",)
    layer_norms = {
        "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
        "mlp.linear_fc2.post_layernorm": "post_feedforward_layernorm",
    }
    windows = WindowByPeriod(4)

    window_rotary_base: float = 500000.0

    @classmethod
    def read_positions(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        return read_layer_ropes(values, (500000.0, 500000.0))

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return layer_ropes_json(super().config_json(), self.window_rotary_base)

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        base = read.number("hf_window_rotary_base")
        return super().read_arguments(read) | dict(window_rotary_base=base)

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().megatron_arguments() | dict(
            hf_norms_over_heads=True, hf_window_rotary_base=self.window_rotary_base
        )

    def transformer_config(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().transformer_config() | dict(
            has_norms_over_heads=True,
            has_post_layernorms=True,
            has_pre_layernorms=False,
            window_rotary_base=self.window_rotary_base,
        )

    def attention_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """See ``HfModel``."""
        yield from super().attention_weights(ours, theirs)
        for part, heads in ("q", self.num_attention_heads), ("k", self.num_query_groups):
            names = f"{ours}{part}_layernorm.weight", f"{theirs}{part}_norm.weight"
            yield outputs(*names, (heads * self.kv_channels,), heads)
