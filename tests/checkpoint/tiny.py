"""Tiny random models of every supported family, and how ranks build the GPT model of one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pg.checkpoint import HfModel
from megatron_pg.mcore import (
    build_gpt_chunks,
    cpu,
    fit_decoder,
    hybrid_stack_local_spec,
    make_transformer_config,
    with_decoder_layers,
    with_sequence_parallel_norms,
)
from megatron_pg.mcore.linear_specs import decoder_block_spec
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL
from megatron_pg.parallel import PipelineSplit
from tests.mcore.harness import with_value_sizes
from tests.ranks import process_group

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
    rope_theta=500000.0,
)
# A ramp within the width of a head, and a factor on cosine and sine.
YARN = dict(
    rope_type="yarn",
    factor=8.0,
    beta_fast=4.0,
    beta_slow=0.5,
    truncate=False,
    original_max_position_embeddings=32,
    rope_theta=100.0,
)
# For families whose own are beyond a small vocabulary.
NO_TOKENS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
BIASED_EXPERTS = dict(
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    topk_group=1,
    routed_scaling_factor=1.8,
    num_nextn_predict_layers=0,
    **NO_TOKENS,
)
LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
)
# Of scores too.
LATENT_YARN = dict(
    rope_type="yarn",
    factor=4.0,
    beta_fast=4.0,
    beta_slow=0.5,
    mscale=1.0,
    mscale_all_dim=0.7,
    original_max_position_embeddings=32,
    rope_theta=100.0,
)
LINEAR = dict(
    head_dim=16,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    full_attention_interval=2,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25),
)
# Steps are as they are: Megatron-Core knows no least one.
MAMBA = dict(
    **NO_TOKENS,
    num_key_value_heads=4,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=4,
    n_groups=4,
    ssm_state_size=6,
    chunk_size=16,
    time_step_min=1e-12,
)
DIVISIBLE_BY = 16


@dataclass(frozen=True)
class Family:
    """A transformers class and its configuration; ``num_layers`` suits 4 stages of 2 chunks."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "5GB"
    config: str | None = None

    @property
    def has_linear_attention(self) -> bool:
        return "linear_key_head_dim" in self.settings

    @property
    def is_hybrid(self) -> bool:
        return "layers_block_type" in self.settings

    @property
    def can_be_built(self) -> bool:
        return HAS_HYBRID_MODEL or not self.is_hybrid

    @property
    def has_experts(self) -> bool:
        return "num_experts_per_tok" in self.settings


FAMILIES = {
    "llama": Family("Llama", dict(num_key_value_heads=4)),
    "llama_tied": Family("Llama", dict(tie_word_embeddings=True), "40KB"),
    "llama_bias": Family("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3_rope": Family("Llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "llama_linear": Family(
        "Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))
    ),
    "llama_yarn": Family("Llama", dict(rope_parameters=YARN, head_dim=16)),
    # Windows are shorter than prompts and than responses.
    "mistral": Family("Mistral", dict(sliding_window=4, head_dim=12), "40KB"),
    "smollm3": Family(
        "SmolLM3",
        dict(
            **NO_TOKENS,
            no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 1],
            use_sliding_window=True,
            sliding_window=6,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=5e6),
        ),
    ),
    "gemma3": Family(
        "Gemma3",
        dict(
            **NO_TOKENS,
            head_dim=12,
            tie_word_embeddings=True,
            query_pre_attn_scalar=20,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"] * 4,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
        config="Gemma3TextConfig",
    ),
    "olmo3": Family(
        "Olmo3",
        dict(
            **NO_TOKENS,
            num_key_value_heads=4,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"] * 4,
            rope_parameters=dict(
                full_attention={k: v for k, v in YARN.items() if k != "truncate"},
                sliding_attention=dict(rope_type="default", rope_theta=1e3),
            ),
        ),
    ),
    "gpt_oss": Family(
        "GptOss",
        dict(
            **NO_TOKENS,
            head_dim=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
            swiglu_limit=0.4,
            rope_parameters=YARN,
        ),
    ),
    "qwen2": Family(
        "Qwen2",
        dict(
            rope_parameters=dict(rope_type="default", rope_theta=1e6),
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=1,
        ),
    ),
    "qwen2_tied": Family("Qwen2", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen3": Family("Qwen3", dict(head_dim=16), "40KB"),
    "qwen3_tied": Family("Qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "qwen3_moe": Family("Qwen3Moe", EXPERTS | dict(head_dim=8, norm_topk_prob=True)),
    "qwen3_moe_unnormalised": Family("Qwen3Moe", EXPERTS | dict(head_dim=8, norm_topk_prob=False)),
    "qwen2_moe": Family("Qwen2Moe", EXPERTS | dict(shared_expert_intermediate_size=24)),
    "qwen2_moe_mixed": Family(
        "Qwen2Moe",
        EXPERTS | dict(shared_expert_intermediate_size=24, mlp_only_layers=[0, 3]),
    ),
    # Every other layer attends, so that every stage has one that does not.
    "qwen3_next": Family(
        "Qwen3Next",
        EXPERTS | LINEAR | dict(shared_expert_intermediate_size=24, mlp_only_layers=[0]),
    ),
    # Four ranks divide all heads.
    "qwen3_5": Family(
        "Qwen3_5",
        LINEAR | dict(tie_word_embeddings=True, num_key_value_heads=4),
        config="Qwen3_5TextConfig",
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5Moe",
        EXPERTS | LINEAR | dict(shared_expert_intermediate_size=24),
        config="Qwen3_5MoeTextConfig",
    ),
    "glm4_moe": Family(
        "Glm4Moe",
        BIASED_EXPERTS
        | dict(head_dim=16, use_qk_norm=True, attention_bias=True, first_k_dense_replace=1),
    ),
    "glm4_moe_lite": Family("Glm4MoeLite", BIASED_EXPERTS | LATENT),
    "deepseek_v3": Family(
        "DeepseekV3",
        BIASED_EXPERTS
        | LATENT
        | dict(first_k_dense_replace=1)
        | dict(n_group=4, topk_group=2, num_experts_per_tok=4, rope_parameters=LATENT_YARN),
    ),
    # Queries without a latent, and experts that all tokens go through.
    "moonlight": Family(
        "DeepseekV3",
        BIASED_EXPERTS
        | LATENT
        | dict(
            q_lora_rank=None,
            n_shared_experts=2,
            n_group=1,
            first_k_dense_replace=1,
            rms_norm_eps=1e-5,
        ),
    ),
    "minimax_m2": Family(
        "MiniMaxM2",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=8,
            rotary_dim=4,
            **NO_TOKENS,
        ),
    ),
    "nemotron_h": Family(
        "NemotronH",
        dict(
            MAMBA,
            layers_block_type=[
                *("linear_attention", "full_attention", "linear_attention", "mlp"),
                *("linear_attention", "linear_attention", "full_attention", "linear_attention"),
            ],
        ),
    ),
    # Groups of experts, of which one is chosen; the width of shared ones is no multiple.
    "nemotron_h_moe": Family(
        "NemotronH",
        MAMBA
        | BIASED_EXPERTS
        | dict(
            layers_block_type=[
                *("linear_attention", "moe", "full_attention", "moe"),
                *("mlp", "moe", "linear_attention", "moe"),
            ],
            moe_shared_expert_intermediate_size=24,
            n_group=2,
        ),
    ),
    "mixtral": Family("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
}
# SmolLM2's relations: nine heads over three groups, tied; six layers for one to three stages.
SMOLLM2 = Family(
    "Llama",
    dict(
        num_hidden_layers=6,
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
)


def make_hf(family: Family, seed: int = 0, num_layers: int = 8) -> Any:
    """The transformers model, its norms and biases random too."""
    settings = dict(
        # No multiple of the padding, so that padded rows exist.
        vocab_size=83,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    settings |= family.settings
    settings |= {
        # Patterns over layers are cut to those that there are.
        key: value[:num_layers]
        for key, value in settings.items()
        if key in ("layer_types", "layers_block_type", "no_rope_layers")
    }
    config = getattr(transformers, family.config or f"{family.name}Config")(**settings)
    model = getattr(transformers, f"{family.name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
            if name.endswith("A_log"):
                # States that last for some tokens.
                parameter.sub_(1)
            if name.endswith("linear_attn.norm.weight"):
                # Below a half it is not exact what Megatron-Core adds one to.
                parameter.clamp_(min=0.5)
            elif family.has_linear_attention and "norm" in name:
                # One is added to it.
                parameter.sub_(1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def save_hf(family: Family, path: Path, **kwargs: Any) -> Any:
    model = make_hf(family, **kwargs)
    model.save_pretrained(path, max_shard_size=family.max_shard_size)
    return model


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sp: bool = False
    ep: int = 1
    etp: int | None = None
    split: PipelineSplit = PipelineSplit()

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("tp", "pp", "vpp", "ep", "etp")}
        other = [f"{name}{n}" for name, n in sizes.items() if n and (n > 1 or name == "etp")]
        other += map(str, self.split.settings().values())
        return "_".join([*other, *(["sp"] if self.sp else [])]) or "dp"


def initialize(layout: Layout) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=dist.get_backend() != "fake",
    )
    model_parallel_cuda_manual_seed(1234, inference_rng_tracker=True, force_reset_rng=True)


@contextmanager
def on_layout(layout: Layout) -> Iterator[None]:
    """The groups of a layout over the ranks of a case, on the CPU."""
    with process_group(), cpu.emulate_cuda():
        initialize(layout)
        yield
    # Megatron keeps one, and what tracks its resources, until the interpreter ends.
    for process in multiprocessing.active_children():
        process.terminate()
        process.join()
    resource_tracker._resource_tracker._stop()


def make_config(model: HfModel, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    return make_transformer_config(
        model.transformer_config()
        | cpu.transformer_config_defaults()
        | ({} if model.num_experts else dict(moe_token_dispatcher_type="alltoall"))
        | layout.split.settings()
        | dict(
            params_dtype=dtype,
            transformer_impl="local",
            pipeline_dtype=dtype,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            sequence_parallel=layout.sp,
            variable_seq_lengths=True,
            calculate_per_token_loss=True,
            overlap_p2p_comm=layout.vpp is not None,
            batch_p2p_comm=layout.vpp is None,
        )
    )


def build(
    model: HfModel, layout: Layout, dtype: torch.dtype = torch.float32, packed: bool = True
) -> list[Any]:
    """This rank's chunks: ours, or the stock model on the stock spec."""
    config = make_config(model, layout, dtype)
    gpt = model.gpt_model(tp_size=layout.tp, make_vocab_size_divisible_by=DIVISIBLE_BY)
    if packed:
        return list(build_gpt_chunks(config, gpt=gpt))
    if model.is_hybrid:
        return [stock_hybrid(config, gpt)]
    chunks = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        block: Any = with_sequence_parallel_norms(
            decoder_block_spec(config, use_te=False, vp_stage=vp_stage), config
        )
        if model.is_latent:
            block = with_value_sizes(block)
        block = with_decoder_layers(block, config)
        ends = dict(ignore_virtual=False, vp_stage=vp_stage)
        chunk = GPTModel(
            config,
            block,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            vp_stage=vp_stage,
            **gpt,
        )
        fit_decoder(chunk)
        chunks.append(chunk)
    return chunks


def stock_hybrid(config: TransformerConfig, hybrid: dict[str, Any]) -> Any:
    """The stock model on the stock stack, one chunk a stage."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    return HybridModel(
        config,
        hybrid_stack_local_spec(config),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **hybrid,
    )
