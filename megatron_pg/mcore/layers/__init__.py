"""Parts of a layer that know packed groups, one wrapped kind a file."""

from .core_attention import (
    AttentionCalls,
    PrefixGroupedCoreAttention,
    attention_backends,
    count_attention_calls,
    layer_windows,
    prefix_grouped_core_attention,
)
from .mended_mla import with_mended_latent_attention
from .mla import (
    PrefixGroupedLatentAttention,
    latent_core_attention,
    prefix_grouped_latent_attention,
)
from .router import PrefixGroupedRouter, prefix_grouped_router
from .self_attention import PrefixGroupedSelfAttention, prefix_grouped_self_attention
from .transformer_layer import PrefixGroupedLayer, prefix_grouped_layer

__all__ = [
    "AttentionCalls",
    "PrefixGroupedCoreAttention",
    "PrefixGroupedLatentAttention",
    "PrefixGroupedLayer",
    "PrefixGroupedRouter",
    "PrefixGroupedSelfAttention",
    "attention_backends",
    "count_attention_calls",
    "latent_core_attention",
    "layer_windows",
    "prefix_grouped_core_attention",
    "prefix_grouped_latent_attention",
    "prefix_grouped_layer",
    "prefix_grouped_router",
    "prefix_grouped_self_attention",
    "with_mended_latent_attention",
]
