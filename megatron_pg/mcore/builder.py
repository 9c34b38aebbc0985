"""Megatron-LM's seam for models: the same call as its ``gpt_builder``."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import import_module
from megatron.core.transformer.transformer_config import TransformerConfig

from .model import PrefixGroupedGPTModel
from .norm import with_sequence_parallel_norms
from .spec import with_prefix_grouped_attention


def gpt_builder(
    args: Any,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> PrefixGroupedGPTModel:
    """Build the GPT model that Megatron-LM's arguments describe, able to run packed groups.

    A drop-in for Megatron-LM's ``gpt_builders.gpt_builder``: change that one import. Checkpoints
    have the stock keys.

    Args:
        args: Megatron-LM's parsed arguments; ``args.spec`` may name any GPT spec.
        pre_process: whether this chunk embeds tokens.
        post_process: whether this chunk predicts.
        vp_stage: virtual pipeline stage of the chunk.
        config: made from ``args`` when None (needs Megatron-LM's ``megatron.training``).
        pg_collection: process groups; Megatron's global ones when None.

    Raises:
        ValueError: listing every setting that prefix grouping does not support; a normalization
            that PyTorch's norms do not have.
        NotImplementedError: if ``args.spec`` names layers without ``SelfAttention``.
        ImportError: if ``config`` is None and Megatron-LM is not there to make it.
    """
    if config is None:
        from megatron.training.arguments import core_transformer_config_from_args

        config = core_transformer_config_from_args(args)
    if config.pipeline_model_parallel_size > 1:
        # Packed rows differ in length between microbatches; stages exchange shapes first.
        config.variable_seq_lengths = True
    return PrefixGroupedGPTModel(
        config=config,
        transformer_layer_spec=with_prefix_grouped_attention(_stock_spec(args, config, vp_stage)),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=getattr(args, "fp16_lm_cross_entropy", False),
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=getattr(args, "use_rope_scaling", False),
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _stock_spec(args: Any, config: TransformerConfig, vp_stage: int | None) -> Any:
    if getattr(args, "spec", None) is not None:
        return import_module(args.spec)
    use_te = getattr(args, "transformer_impl", "transformer_engine") == "transformer_engine"
    if config.num_moe_experts:
        return get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=use_te,
            normalization=config.normalization,
            vp_stage=vp_stage,
        )
    if use_te:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    if importlib.util.find_spec("apex") is None:
        return with_sequence_parallel_norms(spec, config, vp_stage=vp_stage)
    return spec
