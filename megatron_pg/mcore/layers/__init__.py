"""Parts of a layer that know packed groups, one wrapped kind a file."""

from .core_attention import (
    AttentionCalls,
    PrefixGroupedCoreAttention,
    attention_backends,
    count_attention_calls,
    layer_windows,
    prefix_grouped_core_attention,
)
from .linear_attention import PrefixGroupedLinearAttention, prefix_grouped_linear_attention
from .mamba import PrefixGroupedMamba, prefix_grouped_mamba
from .mended_mla import with_mended_latent_attention
from .mla import (
    PrefixGroupedLatentAttention,
    latent_core_attention,
    prefix_grouped_latent_attention,
)
from .output_weight import output_weight
from .router import PrefixGroupedRouter, prefix_grouped_router
from .row import check_row
from .self_attention import PrefixGroupedSelfAttention, prefix_grouped_self_attention
from .transformer_layer import PrefixGroupedLayer, prefix_grouped_layer

__all__ = [
    "AttentionCalls",
    "PrefixGroupedCoreAttention",
    "PrefixGroupedLatentAttention",
    "PrefixGroupedLayer",
    "PrefixGroupedLinearAttention",
    "PrefixGroupedMamba",
    "PrefixGroupedRouter",
    "PrefixGroupedSelfAttention",
    "attention_backends",
    "count_attention_calls",
    "latent_core_attention",
    "layer_windows",
    "check_row",
    "output_weight",
    "prefix_grouped_core_attention",
    "prefix_grouped_latent_attention",
    "prefix_grouped_layer",
    "prefix_grouped_linear_attention",
    "prefix_grouped_mamba",
    "prefix_grouped_router",
    "prefix_grouped_self_attention",
    "with_mended_latent_attention",
]
