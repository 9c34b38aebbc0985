"""What a Hugging Face ``config.json`` says, or why it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import NAMED_DTYPES, read_json
from .hf_config import ARCHITECTURES, LLAMA3_ROPE, HfModel

_KNOWN_KEYS = {
    *("architectures", "model_type", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size"),
    *("max_position_embeddings", "tie_word_embeddings", "rope_theta", "rope_scaling"),
    *("rope_parameters", "hidden_act", "attention_bias", "mlp_bias", "dtype", "torch_dtype"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "layer_types"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "partial_rotary_factor"),
}
# Keys of generation, initialisation and provenance leave the logits alone; so do token ids and
# private keys ("_name_or_path").
_NEUTRAL_KEYS = {
    *("transformers_version", "use_cache", "initializer_range", "attention_dropout"),
    *("pretraining_tp", "output_router_logits", "router_aux_loss_coef", "auto_map"),
    *("transformers.js_config", "is_llama_config", "unsloth_fixed", "unsloth_version"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "tokenizer_class"),
    *("chunk_size_feed_forward", "return_dict", "max_length"),
}


def read_hf_config(hf_dir: str | Path) -> HfModel:
    """Read ``hf_dir/config.json`` (raw, so that no version of transformers reinterprets it).

    Raises:
        ValueError: no such file, no JSON, a missing key, or a setting that contradicts another.
        NotImplementedError: an architecture, rope type or setting that is not supported.
    """
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{hf_dir}: no config.json; pass a Hugging Face model folder")
    return parse_hf_config(read_json(path), str(path))


def parse_hf_config(config: dict[str, Any], where: str = "config.json") -> HfModel:
    """The model of a ``config.json``'s content; ``where`` names it in errors.

    Raises:
        ValueError: a missing key, or a setting that contradicts another.
        NotImplementedError: an architecture, rope type or setting that is not supported.
    """
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise NotImplementedError(
            f"{where}: architecture {architecture!r} is not supported; supported are "
            + ", ".join(ARCHITECTURES)
        )
    _refuse(config, where)
    rope_type, rope_factor, rotary_base = _rope(config, where)

    def need(key: str) -> Any:
        if config.get(key) is None:
            raise ValueError(f"{where}: key {key!r} is missing; {architecture} needs it")
        return config[key]

    heads, hidden = need("num_attention_heads"), need("hidden_size")
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise ValueError(
            f"{where}: num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
        )
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in NAMED_DTYPES:
        raise NotImplementedError(
            f"{where}: dtype {dtype!r} is not supported; use one of {', '.join(NAMED_DTYPES)}"
        )
    moe: dict[str, Any] = {}
    if architecture == "Qwen3MoeForCausalLM":
        moe = dict(
            num_experts=config.get("num_experts") or need("num_local_experts"),
            moe_router_topk=need("num_experts_per_tok"),
            moe_ffn_hidden_size=need("moe_intermediate_size"),
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        )
    return HfModel(
        architecture=architecture,
        num_layers=need("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=need("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=config.get("head_dim") or hidden // heads,
        layernorm_epsilon=need("rms_norm_eps"),
        vocab_size=need("vocab_size"),
        max_sequence_length=need("max_position_embeddings"),
        rotary_base=rotary_base,
        rope_type=rope_type,
        rope_factor=rope_factor,
        tied=bool(config.get("tie_word_embeddings", False)),
        add_bias_linear=bool(config.get("attention_bias")),
        dtype=NAMED_DTYPES[dtype],
        **moe,
    )


def _rope(config: dict[str, Any], where: str) -> tuple[str, float, float]:
    """Rope type, factor and base, from either spelling; both present must agree."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    bases = {float(d["rope_theta"]) for d in (config, new, old) if d.get("rope_theta") is not None}
    if len(bases) > 1:
        raise ValueError(f"{where}: rope_theta is given as {sorted(bases)}; keep one value")
    # The default of all these architectures in transformers.
    bases = bases or {10000.0}

    def scaling(values: dict[str, Any]) -> dict[str, Any]:
        named = {k: v for k, v in values.items() if k not in ("rope_theta", "type")}
        return named | dict(rope_type=values.get("rope_type") or values.get("type") or "default")

    if new and old and scaling(new) != scaling(old):
        raise ValueError(f"{where}: rope_parameters and rope_scaling differ; keep one of them")
    rope = scaling(new or old)
    kind = rope.pop("rope_type")
    allowed: dict[str, dict[str, Any]] = {"default": {}, "linear": {}, "llama3": LLAMA3_ROPE}
    if kind not in allowed:
        raise NotImplementedError(
            f"{where}: rope type {kind!r} is not supported; supported are {', '.join(allowed)}"
        )
    factor = float(rope.pop("factor", 1.0))
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(f"{where}: partial_rotary_factor must be 1.0")
    if kind == "default":
        # Left over from a longer context: it does nothing without a scaling type.
        rope.pop("original_max_position_embeddings", None)
    if rope != allowed[kind]:
        raise NotImplementedError(
            f"{where}: rope type {kind!r} with {rope}; Megatron-Core computes it with "
            f"{allowed[kind]} only"
        )
    return kind, factor, bases.pop()


def _refuse(config: dict[str, Any], where: str) -> None:
    """All settings that would make ``GPTModel`` another model, in one error."""
    problems = []

    def must(key: str, *values: Any) -> None:
        if key in config and config[key] not in values:
            problems.append(f"{key}={config[key]!r} (must be {values[0]!r})")

    must("hidden_act", "silu")
    must("partial_rotary_factor", 1.0, None)
    must("decoder_sparse_step", 1)
    must("mlp_only_layers", [], None)
    must("layer_types", None, ["full_attention"] * config.get("num_hidden_layers", 0))
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        problems.append("attention_bias and mlp_bias must both be true or both false")
    window = config.get("sliding_window")
    if (
        window is not None
        and config.get("use_sliding_window", True)
        and window < config.get("max_position_embeddings", 0)
    ):
        problems.append(f"sliding_window={window} (must be null)")
    unknown = sorted(
        key
        for key in config.keys() - _KNOWN_KEYS - _NEUTRAL_KEYS
        if config[key] and not key.startswith("_") and not key.endswith("_token_id")
    )
    problems += [f"unknown key {key}={json.dumps(config[key])[:80]}" for key in unknown]
    if problems:
        raise NotImplementedError(
            f"{where}: not supported: " + "; ".join(problems) + ". A key that does not change the "
            "logits may be removed from the file"
        )
