"""Qwen3.5's text models: Gated DeltaNet and gated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import (
    MAX_LAYERS,
    ArgumentValues,
    ConfigValues,
    GatedDeltaModel,
    cut_blocks,
    register,
)
from ..table import Row

# Of images: text has one position a token, whatever they say.
_OF_IMAGES = {"mrope_section", "mrope_interleaved"}


@register("Qwen3_5ForCausalLM", "qwen3_5_text")
@dataclass(frozen=True, kw_only=True)
class Qwen3_5(GatedDeltaModel):
    """As ``GatedDeltaModel``; a linear layer's projections are four tensors."""

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        values.must("attn_output_gate", True)
        values.must("mtp_use_dedicated_embeddings", False, None)
        # Of other programs' states.
        values.known.add("mamba_ssm_dtype")
        further = values.size("mtp_num_hidden_layers", MAX_LAYERS, default=0, low=0)
        return super().read_config(values) | dict(mtp_num_layers=further)

    @classmethod
    def read_positions(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        names = "rope_parameters", "rope_scaling"
        sections = {
            name: {k: v for k, v in values.section(name).items() if k not in _OF_IMAGES}
            for name in names
        }
        part = ConfigValues(values.config | sections, values.where)
        fields = super().read_positions(part)
        values.problems += part.problems
        values.refused += part.refused
        values.known |= part.known
        return fields

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().config_json() | dict(mtp_num_hidden_layers=self.mtp_num_layers)

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        is_linear = read.get("experimental_attention_variant") == "gated_delta_net"
        return is_linear and not read.get("num_experts")

    def linear_input(self, ours: str, theirs: str) -> Row:
        """See ``GatedDeltaModel``."""
        key, value, heads = self.key_width, self.value_width, self.linear_num_value_heads
        tensors = dict(qkv=(key, key, value), z=(value,), b=(heads,), a=(heads,))
        named = {f"{theirs}in_proj_{part}.weight": widths for part, widths in tensors.items()}
        shapes: dict[str, tuple[int, ...]] = {
            name: (sum(widths), self.hidden_size) for name, widths in named.items()
        }
        blocks = (block for item in named.items() for block in cut_blocks(*item))
        return Row(ours, shapes, tuple(blocks))
