"""The names that other programs import."""

from __future__ import annotations

import inspect

import megatron_pg


def test_megatron_free_names() -> None:
    assert megatron_pg.__all__ == [
        "PackedLayout",
        "PrefixTree",
        "available_backends",
        "balance_groups",
        "pack_groups",
        "pack_trees",
        "prefix_grouped_attention",
    ]
    assert all(hasattr(megatron_pg, name) for name in megatron_pg.__all__)


def test_attention_names() -> None:
    from megatron_pg import attention

    contract = {"AttentionBackend", "AttentionInputs", "AttentionKind", "ResidentKV"}
    contract |= {"available_backends", "prefix_grouped_attention", "select_backend"}
    assert contract <= set(attention.__all__)
    assert all(hasattr(attention, name) for name in attention.__all__)
    first = list(inspect.signature(attention.prefix_grouped_attention).parameters)[:6]
    assert first == ["q", "k", "v", "layout", "softmax_scale", "backend"]


def test_megatron_names() -> None:
    from megatron_pg import mcore

    contract = {
        "PrefixGroupedHybridModel",
        "PrefixGroupedSeqParams",
        "PrefixSharingGPTModel",
        "RouteRecorder",
        "SequenceParallelLayerNorm",
        "SequenceParallelRMSNorm",
        "attention_backends",
        "count_attention_calls",
        "count_shared_tokens",
        "cpu",
        "hybrid_stack_local_spec",
        "transformer_config_class",
        "undivided_router_losses",
        "validate_config",
        "with_prefix_grouped_attention",
    }
    assert contract <= set(mcore.__all__)
    assert all(hasattr(mcore, name) for name in mcore.__all__)


def test_sizes() -> None:
    from megatron_pg import parallel

    assert parallel.__all__ == [
        "MEGATRON_NAMES",
        "ContextPart",
        "ModelSizes",
        "ParallelSizes",
        "PipelineSplit",
        "attempt",
        "exchanged_values",
        "from_all_ranks",
        "kv_head_copies",
        "on_all_ranks",
        "on_first_rank",
        "told_error",
    ]
    assert all(hasattr(parallel, name) for name in parallel.__all__)


def test_rollout_names() -> None:
    from megatron_pg import rollout

    assert rollout.__all__ == [
        "ANSWER_EXTRACTORS",
        "RELOAD_PLANS",
        "REWARDS",
        "BatchedReward",
        "CombinedReward",
        "Dialect",
        "FilePrompts",
        "FormatReward",
        "GroupStream",
        "HeldOutPrompts",
        "HoldsOut",
        "Identified",
        "Judgement",
        "Message",
        "NamedRewards",
        "OpenAIServerSource",
        "Prompt",
        "PromptSource",
        "ReasoningGymTask",
        "RecordedRollouts",
        "ReloadCall",
        "ReloadPlan",
        "Response",
        "RetryPolicy",
        "RewardError",
        "RewardFunction",
        "RewardSettings",
        "RolloutServerError",
        "RolloutSource",
        "SampledRollouts",
        "SamplingParams",
        "ServerCapabilities",
        "Tokenizer",
        "TooLong",
        "WeightExporter",
        "api_key_problem",
        "base_url_problem",
        "dialect_problem",
        "health_path_problem",
        "held_out_prompts",
        "load_callable",
        "make_groups",
        "math_score",
        "math_verify_reward",
        "reward_settings",
    ]
    assert all(hasattr(rollout, name) for name in rollout.__all__)


def test_checkpoint_names() -> None:
    from megatron_pg import checkpoint

    assert checkpoint.__all__ == [
        "CheckpointFiles",
        "CheckpointSummary",
        "FAMILIES",
        "FileChecksum",
        "HF_FOLDER",
        "HfFolder",
        "HfModel",
        "InUseError",
        "LockedFile",
        "LogitComparison",
        "MegatronFolder",
        "TRACKER",
        "TorchDistReader",
        "TorchDistWriter",
        "WeightSource",
        "compare_logits",
        "compare_training_state",
        "compare_weights",
        "export_hf",
        "file_checksum",
        "find_iteration",
        "has_tokenizer",
        "hf_model_from_args",
        "hf_to_megatron",
        "hf_to_megatron_by_bridge",
        "inspect_checkpoint",
        "is_torch_dist",
        "iter_hf_tensors",
        "iteration_name",
        "load_hf",
        "load_sharded_state",
        "load_weights",
        "lock_file",
        "make_megatron_args",
        "megatron_to_hf",
        "megatron_to_hf_by_bridge",
        "one_rank",
        "open_weights",
        "parse_dtype",
        "parse_hf_config",
        "parse_json",
        "read_hf_config",
        "read_tracker",
        "reshard_checkpoint",
        "write_hf_metadata_folder",
        "write_manifest",
    ]
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
