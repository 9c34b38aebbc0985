"""MiniMax-M2: experts chosen by biased scores, queries and keys normalised over all heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    ExpertNames,
    ExpertsModel,
    check_rotated,
    register,
)
from ..table import Row, outputs

# Of other programs, and of other models of theirs; no such layer is among the published weights.
_NEUTRAL = {
    *("shared_moe_mode", "mtp_transformer_layers", "num_mtp_modules", "use_mtp"),
    *("mlp_intermediate_size", "max_model_len"),
}


@register("MiniMaxM2ForCausalLM", "minimax_m2")
@dataclass(frozen=True, kw_only=True)
class MiniMaxM2(ExpertsModel):
    """As ``ExpertsModel``, of ``mcore.DecoderConfig``; an expert is as wide as an MLP would be."""

    default_rotary_base = 5e6
    own_defaults = ("num_key_value_heads", "head_dim")
    own_rotary_percent = 1.0
    names = ExpertNames(
        block="block_sparse_moe.", bias="e_score_correction_bias", mlp=("w1", "w3", "w2")
    )
    keys = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    moe_router_score_function = "sigmoid"
    moe_router_enable_expert_bias = True

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_config(values)
        values.must("router_jitter_noise", 0.0, None)
        values.must("scoring_func", "sigmoid")
        values.must("use_routing_bias", True)
        values.must("use_qk_norm", True)
        values.must("qk_norm_type", "per_layer")
        values.must("shared_intermediate_size", 0, None)
        for part in ("full_attention", "linear_attention", "mlp"):
            values.must(f"layernorm_{part}_beta", 1.0, None)
        values.must("attn_type_list", None, [1] * fields["num_layers"])
        values.known |= _NEUTRAL
        rotated = values.size("rotary_dim", default=None)
        if rotated is not None:
            percent = rotated / fields["kv_channels"]
            if fields["rotary_percent"] not in (1.0, percent) or percent > 1.0:
                values.problems.append(f"rotary_dim={rotated} contradicts partial_rotary_factor")
            check_rotated(fields["kv_channels"], percent, values)
            fields["rotary_percent"] = percent
        return fields

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().config_json() | dict(
            rotary_dim=round(self.rotary_percent * self.kv_channels),
            partial_rotary_factor=self.rotary_percent,
        )

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        percent = read.number("rotary_percent", 1.0)
        return super().read_arguments(read) | dict(rotary_percent=percent)

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().megatron_arguments() | dict(hf_norms_over_heads=True)

    def transformer_config(self) -> dict[str, Any]:
        """See ``Decoder``."""
        return super().transformer_config() | dict(has_norms_over_heads=True)

    def attention_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """See ``Decoder``."""
        yield from super().attention_weights(ours, theirs)
        for part, heads in ("q", self.num_attention_heads), ("k", self.num_query_groups):
            shape = (heads * self.kv_channels,)
            names = f"{ours}{part}_layernorm.weight", f"{theirs}{part}_norm.weight"
            yield outputs(*names, shape, heads)
