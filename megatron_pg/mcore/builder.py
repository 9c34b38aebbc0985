"""Megatron-LM's two seams for models: one import of ``pretrain_gpt.py`` changed to ours.

Core 0.16 to 0.18 build from ``gpt_builder``, 0.19 and later from ``gpt_config_from_args``.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
    get_gpt_heterogeneous_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_config import TransformerConfig

from .linear_specs import decoder_block_spec
from .norm import with_sequence_parallel_norms
from .sharing import PrefixSharingGPTModel
from .spec import with_prefix_grouped_attention
from .validate import validate_config

# Of the configuration, by the name that the layer specs give them.
_LAYER_SETTINGS = (
    "multi_latent_attention",
    "qk_layernorm",
    "qk_l2_norm",
    "use_kitchen",
    "use_kitchen_attention",
)
_TE_LAYER_SETTINGS = (
    *_LAYER_SETTINGS,
    "kitchen_attention_backend",
    "mla_down_proj_fusion",
    "use_te_activation_func",
    "use_grouped_gemm_for_dense_mlp",
)


def gpt_builder(
    args: Any,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> PrefixSharingGPTModel:
    """Build the GPT model that Megatron-LM's arguments describe, able to run packed groups.

    It is the transparent model: ``thd`` rows, as ``pretrain_gpt.py`` makes them of packed
    sequences, run with their shared tokens encoded once; other batches run as in the stock model.

    A drop-in for ``gpt_builders.gpt_builder``, from which Megatron-LM's ``pretrain_gpt.py`` builds
    up to core 0.18 (later ones import it, and build from ``gpt_config_from_args``). Checkpoints
    have the stock keys.

    Args:
        args: Megatron-LM's parsed arguments; ``args.spec`` may name any GPT spec, or a function of
            ``(args, config, vp_stage)`` that makes one.
        pre_process: whether this chunk embeds tokens.
        post_process: whether this chunk predicts.
        vp_stage: virtual pipeline stage of the chunk.
        config: made from ``args`` when None (needs Megatron-LM's ``megatron.training``).
        pg_collection: process groups; Megatron's global ones when None.

    Raises:
        ValueError: listing every setting that prefix grouping does not support; a normalization
            that PyTorch's norms do not have.
        NotImplementedError: if ``args.spec`` names layers without ``SelfAttention``, or the
            arguments ask for a model that is not Megatron-Core's.
        ImportError: if ``config`` is None and Megatron-LM is not there to make it.
    """
    for name in ("use_legacy_models", "yaml_cfg", "modelopt_enabled"):
        if getattr(args, name, None):
            raise NotImplementedError(
                f"{name}={getattr(args, name)!r}: another builder makes that model; leave it out"
            )
    if config is None:
        from megatron.training.arguments import core_transformer_config_from_args

        config = core_transformer_config_from_args(args)
    validate_config(_exchange_shapes(config))
    return PrefixSharingGPTModel(
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


def gpt_config_from_args(
    args: Any, config: TransformerConfig | None = None, model_config_cls: type | None = None
) -> Any:
    """Describe the GPT model of Megatron-LM's arguments, able to run packed groups.

    A drop-in for ``megatron.training.argument_utils.gpt_config_from_args``, from which
    Megatron-LM's ``pretrain_gpt.py`` builds since core 0.19: what its ``pretrain`` builds from the
    result is a ``PrefixSharingGPTModel`` as of ``gpt_builder``, with the stock keys in checkpoints.

    Args:
        args: Megatron-LM's parsed arguments; ``args.spec`` may name any GPT spec.
        config: made from ``args`` when None.
        model_config_cls: as Megatron-LM passes it for ModelOpt, which brings layers of its own.

    Returns:
        A ``GPTModelConfig``.

    Raises:
        NotImplementedError: if ``model_config_cls`` is given.
        ImportError: if there is no Megatron-LM, or one before core 0.19.
    """
    if model_config_cls is not None:
        raise NotImplementedError(
            f"model_config_cls={model_config_cls.__name__} builds layers of its own; leave "
            "modelopt_enabled out"
        )
    try:
        from megatron.training import argument_utils

        from .model_config import PrefixGroupedGPTModelConfig
    except ImportError as error:
        raise ImportError(
            f"Megatron-LM's model config is not there ({error}); before core 0.19 it builds from "
            "gpt_builder: import that from megatron_pg.mcore"
        ) from error
    model_config = argument_utils.gpt_config_from_args(args, config, PrefixGroupedGPTModelConfig)
    _exchange_shapes(model_config.transformer)
    return model_config


def _exchange_shapes(config: TransformerConfig) -> TransformerConfig:
    if config.pipeline_model_parallel_size > 1:
        # Packed rows differ in length between microbatches; stages exchange shapes first.
        config.variable_seq_lengths = True
    return config


def _stock_spec(args: Any, config: TransformerConfig, vp_stage: int | None) -> Any:
    if getattr(args, "spec", None) is not None:
        given = import_module(args.spec)
        is_made = callable(given) and not isinstance(given, ModuleSpec)
        return given(args, config, vp_stage) if is_made else given
    implementation = getattr(args, "transformer_impl", "transformer_engine")
    if implementation not in ("transformer_engine", "local"):
        raise NotImplementedError(
            f"transformer_impl={implementation!r} has a spec of its own; use 'transformer_engine' "
            "or 'local'"
        )
    use_te = implementation == "transformer_engine"
    if config.num_moe_experts or config.experimental_attention_variant is not None:
        spec: Any = decoder_block_spec(config, use_te=use_te, vp_stage=vp_stage)
    elif getattr(args, "heterogeneous_layers_config_path", None) is not None:
        return get_gpt_heterogeneous_layer_spec(config, use_te)
    else:
        names = _TE_LAYER_SETTINGS if use_te else _LAYER_SETTINGS
        # A setting that this version does not have cannot be on.
        settings = {name: getattr(config, name) for name in names if getattr(config, name, None)}
        if use_te:
            return get_gpt_layer_with_transformer_engine_spec(**settings)
        spec = get_gpt_layer_local_spec(normalization=config.normalization, **settings)
    if not use_te and importlib.util.find_spec("apex") is None:
        return with_sequence_parallel_norms(spec, config, vp_stage=vp_stage)
    return spec
