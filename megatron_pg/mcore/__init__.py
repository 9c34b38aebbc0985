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
from .hybrid import PrefixGroupedHybridModel, hybrid_stack_local_spec
from .layers import AttentionCalls, attention_backends, count_attention_calls, layer_windows
from .linear_specs import with_local_linear_layers
from .model import PrefixGroupedGPTModel, PrefixGroupedModel
from .norm import (
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    with_sequence_parallel_norms,
)
from .params import PrefixGroupedSeqParams
from .pipeline import (
    expert_layers_per_stage,
    layers_of_stages,
    layers_per_chunk,
    layers_per_stage,
    stage_problems,
)
from .predictions import Predictions
from .resident import PrefixKV, ScheduledRow
from .routers import (
    ROUTER_LOSSES,
    RouteRecorder,
    check_replayable,
    has_router_losses,
    has_sample_losses,
    take_router_losses,
    undivided_router_losses,
)
from .schedule import prefix_resident_forward_backward
from .sharing import PrefixSharingGPTModel, SharedTokens, count_shared_tokens
from .spec import with_prefix_grouped_attention
from .validate import FieldVerdict, field_verdict, validate_config
from .versions import (
    DIVIDES_LINEAR_ATTENTION,
    FREES_AFTER_SENDING,
    OWN_WRITER,
    TESTED_VERSIONS,
)

__all__ = [
    "DIVIDES_LINEAR_ATTENTION",
    "FREES_AFTER_SENDING",
    "OWN_WRITER",
    "ROUTER_LOSSES",
    "AttentionCalls",
    "DecoderConfig",
    "FieldVerdict",
    "GeneratedResponse",
    "Predictions",
    "PrefixGroupedGPTModel",
    "PrefixGroupedSeqParams",
    "PrefixGroupedHybridModel",
    "PrefixGroupedModel",
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
    "expert_layers_per_stage",
    "field_verdict",
    "fit_decoder",
    "generate",
    "gpt_builder",
    "gpt_config_from_args",
    "has_router_losses",
    "has_sample_losses",
    "hybrid_stack_local_spec",
    "layer_windows",
    "layers_of_stages",
    "layers_per_chunk",
    "layers_per_stage",
    "make_transformer_config",
    "prefix_resident_forward_backward",
    "stage_problems",
    "take_router_losses",
    "transformer_config_class",
    "undivided_router_losses",
    "validate_config",
    "with_decoder_layers",
    "with_local_linear_layers",
    "with_prefix_grouped_attention",
    "with_sequence_parallel_norms",
]
