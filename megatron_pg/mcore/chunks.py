"""This rank's part of a GPT model, built from Megatron's settings alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from .decoder import with_decoder_layers
from .hybrid import build_hybrid_chunks
from .layers import with_mended_latent_attention
from .linear_specs import decoder_block_spec
from .model import PrefixGroupedGPTModel, PrefixGroupedModel
from .norm import with_sequence_parallel_norms
from .spec import with_prefix_grouped_attention


def build_gpt_chunks(
    config: TransformerConfig,
    *,
    gpt: Mapping[str, Any],
    use_te: bool = False,
    attention_backend: str = "auto",
) -> list[PrefixGroupedModel]:
    """This rank's model chunks, randomly initialised, in the dtype of their parameters.

    Equals the stock ``GPTModel`` of the same settings; its layers run packed groups too. Which
    layers have experts, norms of queries and keys and the like, the configuration alone says.
    Latent attention has the gradients of one rank on any number of tensor-parallel ranks, where the
    stock one may leave other ranks' heads out of the key part that heads share. The norm of
    gradients counts the offsets of all ranks' heads (``softmax_type``), the stock one the first's.

    Args:
        config: of the whole model; its pipeline sizes are those of Megatron's process groups.
        gpt: keyword arguments of ``GPTModel`` beside configuration, spec and place; of
            ``HybridModel`` where they name a ``hybrid_layer_pattern``.
        use_te: layers of Transformer Engine; local ones with PyTorch's norms otherwise.
        attention_backend: see ``with_prefix_grouped_attention``.

    Returns:
        One chunk, or one for every virtual stage under an interleaved schedule.
    """
    if "hybrid_layer_pattern" in gpt:
        return build_hybrid_chunks(config, gpt, use_te, attention_backend)
    vpp = config.virtual_pipeline_model_parallel_size
    chunks: list[PrefixGroupedModel] = []
    for vp_stage in [None] if vpp is None else range(vpp):
        spec = decoder_block_spec(config, use_te=use_te, vp_stage=vp_stage)
        if not use_te:
            spec = with_sequence_parallel_norms(spec, config, vp_stage=vp_stage)
        spec = with_decoder_layers(spec, config)
        spec = with_mended_latent_attention(spec)
        place: dict[str, Any] = dict(ignore_virtual=False, vp_stage=vp_stage)
        chunk = PrefixGroupedGPTModel(
            config,
            with_prefix_grouped_attention(spec, attention_backend),
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=vp_stage,
            **gpt,
        )
        _mark_sharded_offsets(chunk)
        chunks.append(chunk.to(config.params_dtype))
    return chunks


def _mark_sharded_offsets(chunk: torch.nn.Module) -> None:
    """Megatron-Core does not say that heads' offsets are divided over tensor-parallel ranks.

    The norm by which gradients are clipped would hold those of the first rank alone.
    """
    for name, parameter in chunk.named_parameters():
        is_marked = getattr(parameter, "tensor_model_parallel", False)
        if name.endswith(".softmax_offset") and not is_marked:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
