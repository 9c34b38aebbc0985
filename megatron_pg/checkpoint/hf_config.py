"""A model in Hugging Face's and in Megatron-Core's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..parallel import ModelSizes

# architecture -> model_type
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# What Megatron-Core computes llama3 scaling with.
LLAMA3_ROPE = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """A decoder-only model that Hugging Face's ``config.json`` and ``GPTModel`` both describe.

    Equals the model of ``transformers``: building ``GPTModel`` from ``transformer_config()``,
    ``spec()`` and ``gpt_model()`` and loading the folder's weights gives the same logits.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    layernorm_epsilon: float
    vocab_size: int
    max_sequence_length: int
    rotary_base: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    tied: bool = False
    add_bias_linear: bool = False
    num_experts: int | None = None
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    norm_topk_prob: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def add_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.add_bias_linear or self.architecture == "Qwen2ForCausalLM"

    @property
    def qk_layernorm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")

    @property
    def sizes(self) -> ModelSizes:
        """What parallel ranks divide."""
        return ModelSizes(
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            num_layers=self.num_layers,
            widths={} if self.num_experts else {"ffn_hidden_size": self.ffn_hidden_size},
            expert_widths={"moe_ffn_hidden_size": self.moe_ffn_hidden_size or 0},
            num_moe_experts=self.num_experts,
        )

    def transformer_config(self) -> dict[str, Any]:
        """Keyword arguments of ``TransformerConfig`` that the architecture fixes.

        Parallel sizes, ``params_dtype``, recompute and fusions stay the caller's.
        """
        settings: dict[str, Any] = dict(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            layernorm_epsilon=self.layernorm_epsilon,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=self.add_bias_linear,
            add_qkv_bias=self.add_qkv_bias,
            qk_layernorm=self.qk_layernorm,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
        if self.num_experts is not None:
            settings |= dict(
                num_moe_experts=self.num_experts,
                moe_router_topk=self.moe_router_topk,
                moe_ffn_hidden_size=self.moe_ffn_hidden_size,
                # Softmax over all experts and no renormalisation, or softmax over the chosen.
                moe_router_pre_softmax=not self.norm_topk_prob,
                moe_router_load_balancing_type="none",
                moe_token_dispatcher_type="alltoall",
                moe_grouped_gemm=False,
            )
        return settings

    def spec(self) -> dict[str, Any]:
        """Keyword arguments of ``get_gpt_layer_local_spec`` (and of its siblings)."""
        settings: dict[str, Any] = dict(qk_layernorm=self.qk_layernorm)
        if self.num_experts is not None:
            settings |= dict(num_experts=self.num_experts, moe_grouped_gemm=False)
        return settings

    def gpt_model(
        self, *, tp_size: int = 1, make_vocab_size_divisible_by: int = 1
    ) -> dict[str, Any]:
        """Keyword arguments of ``GPTModel``; the vocabulary is padded for ``tp_size`` ranks."""
        return dict(
            vocab_size=self.padded_vocab_size(tp_size, make_vocab_size_divisible_by),
            max_sequence_length=self.max_sequence_length,
            position_embedding_type="rope",
            rotary_base=self.rotary_base,
            share_embeddings_and_output_weights=self.tied,
            rope_scaling=self.rope_type == "llama3",
            rope_scaling_factor=self.rope_factor,
            seq_len_interpolation_factor=self.rope_factor if self.rope_type == "linear" else None,
        )

    def padded_vocab_size(self, tp_size: int = 1, make_vocab_size_divisible_by: int = 1) -> int:
        """Vocabulary rounded up to ``make_vocab_size_divisible_by * tp_size``, as Megatron-LM.

        Raises:
            ValueError: if one of the two is below 1.
        """
        if tp_size < 1 or make_vocab_size_divisible_by < 1:
            raise ValueError(
                f"tp_size={tp_size} and make_vocab_size_divisible_by="
                f"{make_vocab_size_divisible_by} must be at least 1"
            )
        multiple = make_vocab_size_divisible_by * tp_size
        return -(-self.vocab_size // multiple) * multiple

    def config_json(self) -> dict[str, Any]:
        """A ``config.json`` for this model; rope in both spellings, for transformers 4 and 5."""
        rope: dict[str, Any] = dict(rope_type=self.rope_type)
        if self.rope_type != "default":
            rope["factor"] = self.rope_factor
        if self.rope_type == "llama3":
            rope |= LLAMA3_ROPE
        config: dict[str, Any] = dict(
            architectures=[self.architecture],
            model_type=ARCHITECTURES[self.architecture],
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_query_groups,
            head_dim=self.kv_channels,
            hidden_act="silu",
            rms_norm_eps=self.layernorm_epsilon,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_sequence_length,
            tie_word_embeddings=self.tied,
            rope_theta=self.rotary_base,
            rope_scaling=None if self.rope_type == "default" else rope,
            rope_parameters=rope | dict(rope_theta=self.rotary_base),
            torch_dtype=str(self.dtype).removeprefix("torch."),
        )
        if self.architecture == "LlamaForCausalLM":
            config |= dict(attention_bias=self.add_bias_linear, mlp_bias=self.add_bias_linear)
        if self.architecture == "MistralForCausalLM":
            config |= dict(sliding_window=None)
        if self.num_experts is not None:
            config |= dict(
                num_experts=self.num_experts,
                num_experts_per_tok=self.moe_router_topk,
                moe_intermediate_size=self.moe_ffn_hidden_size,
                norm_topk_prob=self.norm_topk_prob,
                decoder_sparse_step=1,
                mlp_only_layers=[],
            )
        return config
