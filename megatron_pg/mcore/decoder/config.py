"""Megatron's configuration of a decoder, with what models read off it and no class declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


@dataclass
class DecoderConfig(TransformerConfig):
    """``TransformerConfig`` with fields that models read without its declaring them.

    Those of YaRN are read by Megatron-Core, the others by ``with_decoder_layers`` and
    ``fit_decoder``.

    Attributes:
        embedding_multiplier: of the embedded tokens; None: as they are.
        has_norms_over_heads: whether queries and keys are normalised over all heads together;
            ``qk_layernorm`` is for norms of each head.
        has_post_layernorms: whether what attention and MLP add to a layer is normalised first.
        has_pre_layernorms: whether what attention and MLP read is normalised.
        window_rotary_base: of positions in layers with a window, not scaled; None: as in others.
        yarn_rotary_scaling_factor: by which YaRN lengthens the context; 1: not at all.
        yarn_original_max_position_embeddings: context before.
        yarn_beta_fast: turns within it above which a frequency stays.
        yarn_beta_slow: turns below which a frequency is divided by the factor.
        yarn_mscale: of the factor on cosine and sine.
        yarn_mscale_all_dim: of the factor that divides it.
        yarn_correction_range_round_to_int: whether the range between the two is rounded outwards.
    """

    embedding_multiplier: float | None = None
    has_norms_over_heads: bool = False
    has_post_layernorms: bool = False
    has_pre_layernorms: bool = True
    window_rotary_base: float | None = None
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    yarn_correction_range_round_to_int: bool = True


@dataclass
class LatentConfig(MLATransformerConfig):
    """``MLATransformerConfig`` for models whose latents are normalised otherwise than layers.

    Attributes:
        latent_layernorm_epsilon: of the norms of latents, in models of ``build_gpt_chunks``; None:
            ``layernorm_epsilon``.
    """

    latent_layernorm_epsilon: float | None = None


_OWN_CLASSES: tuple[type[TransformerConfig], ...] = (DecoderConfig, LatentConfig)


def transformer_config_class(settings: Mapping[str, Any]) -> type[TransformerConfig]:
    """The class that has the fields of these settings."""
    is_latent = bool(settings.get("multi_latent_attention"))
    stock: type[TransformerConfig] = MLATransformerConfig if is_latent else TransformerConfig
    known = {field.name for field in fields(stock)}
    for cls in _OWN_CLASSES:
        is_same_kind = issubclass(cls, MLATransformerConfig) == is_latent
        if is_same_kind and ({f.name for f in fields(cls)} - known) & settings.keys():
            return cls
    return stock


def make_transformer_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """The configuration of these settings, of the class that has their fields."""
    return transformer_config_class(settings)(**settings)
