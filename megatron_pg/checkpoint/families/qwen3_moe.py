"""Qwen3-MoE: Qwen3 with experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..description import (
    MAX_EXPERTS,
    NEED,
    ArgumentValues,
    ConfigValues,
    HfModel,
    WindowInEveryLayer,
    register,
)
from ..table import Row, gated_mlp, whole


@register("Qwen3MoeForCausalLM", "qwen3_moe")
@dataclass(frozen=True, kw_only=True)
class Qwen3Moe(HfModel):
    """As ``HfModel``, with norms of queries and keys, and with experts.

    Attributes:
        norm_topk_prob: whether the weights of the chosen experts add up to one.
    """

    qk_layernorm = True
    windows = WindowInEveryLayer(switch=True)

    num_experts: int = field()
    moe_ffn_hidden_size: int = field()
    moe_router_topk: int = field()
    norm_topk_prob: bool = True

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        one, other = values.get("num_experts"), values.get("num_local_experts")
        if None not in (one, other) and one != other:
            values.problems.append(f"num_experts={one!r} and num_local_experts={other!r} differ")
        count = values.size("num_experts" if other is None else "num_local_experts", MAX_EXPERTS)
        values.must("decoder_sparse_step", 1)
        values.must("mlp_only_layers", [], None)
        return super().read_config(values) | dict(
            num_experts=count,
            moe_router_topk=values.size("num_experts_per_tok", count),
            moe_ffn_hidden_size=values.size("moe_intermediate_size"),
            norm_topk_prob=values.flag("norm_topk_prob"),
        )

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().config_json() | dict(
            num_experts=self.num_experts,
            num_experts_per_tok=self.moe_router_topk,
            moe_intermediate_size=self.moe_ffn_hidden_size,
            norm_topk_prob=self.norm_topk_prob,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        return bool(read.get("num_experts"))

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        count, topk = read.size("num_experts", high=MAX_EXPERTS), read.size("moe_router_topk")
        if topk > count:
            raise ValueError(
                f"{read.where}: args have moe_router_topk={topk} of num_experts={count}; {NEED}"
            )
        width = read.size("moe_ffn_hidden_size", None) or read.size("ffn_hidden_size")
        return super().read_arguments(read) | dict(
            num_experts=count,
            moe_router_topk=topk,
            moe_ffn_hidden_size=width,
            norm_topk_prob=not read.get("moe_router_pre_softmax"),
        )

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().megatron_arguments() | self._routing()

    def transformer_config(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return (
            super().transformer_config()
            | self._routing()
            | dict(
                num_moe_experts=self.num_experts,
                moe_router_load_balancing_type="none",
                moe_token_dispatcher_type="alltoall",
                moe_grouped_gemm=False,
            )
        )

    def _routing(self) -> dict[str, Any]:
        """What arguments and configuration have one name for."""
        return dict(
            moe_ffn_hidden_size=self.moe_ffn_hidden_size,
            moe_router_topk=self.moe_router_topk,
            # Softmax over all experts and no renormalisation, or softmax over the chosen.
            moe_router_pre_softmax=not self.norm_topk_prob,
        )

    def mlp_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """See ``HfModel``."""
        shape = self.num_experts, self.hidden_size
        yield whole(f"{ours}router.weight", f"{theirs}gate.weight", shape)
        for expert in range(self.num_experts):
            names = f"{ours}experts.local_experts.{expert}.", f"{theirs}experts.{expert}."
            sizes = self.hidden_size, self.moe_ffn_hidden_size
            yield from gated_mlp(*names, *sizes, has_bias=False)
