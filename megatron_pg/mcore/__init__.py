"""How Megatron-Core runs prefix-grouped attention."""

from . import cpu
from .builder import gpt_builder, gpt_config_from_args
from .chunks import build_gpt_chunks
from .decoder import (
    DecoderConfig,
    fit_decoder,
    make_transformer_config,
    transformer_config_class,
    with_decoder_layers,
)
from .generation.generate import GeneratedResponse, generate
from .layers import AttentionCalls, attention_backends, count_attention_calls, layer_windows
from .model import PrefixGroupedGPTModel
from .norm import (
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    with_sequence_parallel_norms,
)
from .params import PrefixGroupedSeqParams
from .predictions import Predictions
from .prefix_kv import PrefixKV, ScheduledRow
from .router_losses import (
    ROUTER_LOSSES,
    has_router_losses,
    has_sample_losses,
    take_router_losses,
)
from .routes import RouteRecorder, check_replayable
from .schedule import prefix_resident_forward_backward
from .sharing import PrefixSharingGPTModel, SharedTokens, count_shared_tokens
from .spec import with_prefix_grouped_attention
from .validate import FieldVerdict, field_verdict, validate_config
from .versions import OWN_WRITER, TESTED_VERSIONS

__all__ = [
    "OWN_WRITER",
    "ROUTER_LOSSES",
    "AttentionCalls",
    "DecoderConfig",
    "FieldVerdict",
    "GeneratedResponse",
    "Predictions",
    "PrefixGroupedGPTModel",
    "PrefixGroupedSeqParams",
    "PrefixKV",
    "PrefixSharingGPTModel",
    "RouteRecorder",
    "ScheduledRow",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "SharedTokens",
    "TESTED_VERSIONS",
    "attention_backends",
    "check_replayable",
    "build_gpt_chunks",
    "count_attention_calls",
    "count_shared_tokens",
    "cpu",
    "field_verdict",
    "fit_decoder",
    "generate",
    "gpt_builder",
    "gpt_config_from_args",
    "has_router_losses",
    "has_sample_losses",
    "layer_windows",
    "make_transformer_config",
    "prefix_resident_forward_backward",
    "take_router_losses",
    "transformer_config_class",
    "validate_config",
    "with_decoder_layers",
    "with_prefix_grouped_attention",
    "with_sequence_parallel_norms",
]
