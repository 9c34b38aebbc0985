"""GLM-4.5 and GLM-4.6: experts as DeepSeek-V3 has them, and positions in half of each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    BiasedExpertsModel,
    ConfigValues,
    kind_of_experts,
    register,
)


@register("Glm4MoeForCausalLM", "glm4_moe")
@dataclass(frozen=True, kw_only=True)
class Glm4Moe(BiasedExpertsModel):
    """As ``BiasedExpertsModel``, with grouped queries.

    Attributes:
        use_qk_norm: whether queries and keys are normalised per head.
        attention_bias: whether the query, key and value projections have biases.
    """

    own_rotary_percent = 0.5

    use_qk_norm: bool = False
    attention_bias: bool = False

    @property
    def qk_layernorm(self) -> bool:  # type: ignore[override]
        """See ``Decoder``."""
        return self.use_qk_norm

    @property
    def add_qkv_bias(self) -> bool:
        """See ``Decoder``."""
        return self.attention_bias

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().read_config(values) | dict(
            use_qk_norm=values.flag("use_qk_norm"), attention_bias=values.flag("attention_bias")
        )

    @classmethod
    def read_bias(cls, values: ConfigValues) -> bool:
        """Never in all linear layers."""
        values.must("mlp_bias", False)
        return False

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().config_json() | dict(
            use_qk_norm=self.use_qk_norm,
            attention_bias=self.attention_bias,
            partial_rotary_factor=self.rotary_percent,
        )

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        return kind_of_experts(read) == "biased"

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().read_arguments(read) | dict(
            use_qk_norm=bool(read.get("qk_layernorm")),
            attention_bias=bool(read.get("add_qkv_bias")),
            rotary_percent=read.number("rotary_percent", 1.0),
        )
