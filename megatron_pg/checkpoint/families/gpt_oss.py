"""gpt-oss in bf16: experts with biases, windows in every other layer, and sinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_geglu import quick_gelu

from ..description import (
    ArgumentValues,
    ConfigValues,
    ExpertsModel,
    WindowByPeriod,
    kind_of_experts,
    register,
)
from ..table import Row, gated_expert, outputs, whole


@register("GptOssForCausalLM", "gpt_oss")
@dataclass(frozen=True, kw_only=True)
class GptOss(ExpertsModel):
    """As ``ExpertsModel``, with biases everywhere, and a clamped gate.

    Attributes:
        swiglu_limit: of what an expert's gate and the other half are clamped to.
    """

    default_rotary_base = 150000.0
    keys = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    own_defaults = ("num_key_value_heads", "head_dim", "sliding_window", "num_experts_per_tok")
    windows = WindowByPeriod(2)

    swiglu_limit: float = 7.0

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        # The constant of Megatron-Core's activation.
        values.must("swiglu_alpha", 1.702)
        values.get("initial_context_length")
        topk, other = values.get("num_experts_per_tok"), values.get("experts_per_token")
        if other not in (None, topk):
            values.problems.append(f"num_experts_per_tok={topk!r}, experts_per_token={other!r}")
        limit = values.number("swiglu_limit", 1e-3, 1e6, default=7.0)
        return super().read_config(values) | dict(swiglu_limit=limit)

    @classmethod
    def read_bias(cls, values: ConfigValues) -> bool:
        """All linear layers have one."""
        values.must("attention_bias", True)
        return True

    @classmethod
    def read_positions(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        if not (values.section("rope_parameters") or values.section("rope_scaling")):
            values.problems.append(
                "rope_parameters is missing: name it, for transformers has YaRN where there is none"
            )
        return super().read_positions(values)

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().config_json() | dict(attention_bias=True, swiglu_limit=self.swiglu_limit)

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        return kind_of_experts(read) == "sinks"

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        limit = read.number("activation_func_clamp_value")
        return super().read_arguments(read) | dict(swiglu_limit=limit)

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().megatron_arguments() | self._own() | dict(swiglu=False, quick_geglu=True)

    def transformer_config(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().transformer_config() | self._own() | dict(activation_func=quick_gelu)

    def _own(self) -> dict[str, Any]:
        """What arguments and configuration have one name for."""
        return dict(
            softmax_type="learnable",
            glu_linear_offset=1.0,
            activation_func_clamp_value=self.swiglu_limit,
        )

    def attention_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """See ``HfModel``."""
        yield from super().attention_weights(ours, theirs)
        heads = self.num_attention_heads
        sinks = f"{ours}core_attention.softmax_offset", f"{theirs}sinks", (heads,)
        yield outputs(*sinks, num_heads=heads)

    def mlp_weights(self, layer: int, ours: str, theirs: str) -> Iterator[Row]:
        """See ``HfModel``."""
        ours, theirs, count = f"{ours}mlp.", f"{theirs}mlp.", self.num_experts
        for name, rest in ("weight", (self.hidden_size,)), ("bias", ()):
            yield whole(f"{ours}router.{name}", f"{theirs}router.{name}", (count, *rest))
        for expert in range(count):
            names = f"{ours}experts.local_experts.{expert}.", f"{theirs}experts."
            sizes = self.hidden_size, self.moe_ffn_hidden_size
            yield from gated_expert(*names, expert, count, *sizes)
