"""What a Hugging Face ``config.json`` says, or why it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .files import NAMED_DTYPES, read_json
from .hf_config import ARCHITECTURES, LLAMA3_ROPE, HfModel
from .hf_values import ConfigValues

# Beyond every model of these architectures; they keep a damaged number from filling memory.
MAX_LAYERS, MAX_EXPERTS = 1000, 1000

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
# Keys that transformers fills with a number where the file lacks them.
_OWN_DEFAULTS = {
    "MistralForCausalLM": ("num_key_value_heads", "sliding_window"),
    "Qwen2ForCausalLM": ("num_key_value_heads",),
    "Qwen3ForCausalLM": ("num_key_value_heads", "head_dim"),
    "Qwen3MoeForCausalLM": ("num_key_value_heads",),
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
        ValueError: a missing key, a value of another type or beyond what a model can have, or a
            setting that contradicts another.
        NotImplementedError: an architecture, rope type or setting that is not supported.
    """
    architecture = _architecture(config, where)
    values = ConfigValues(config, where)
    sizes = _sizes(values, architecture)
    moe = _experts(values) if architecture == "Qwen3MoeForCausalLM" else {}
    rope_type, rope_factor, rotary_base = _rope(values)
    tied, bias = values.flag("tie_word_embeddings"), values.flag("attention_bias")
    for key in ("mlp_bias", "use_sliding_window"):
        values.flag(key)
    window = values.size("sliding_window", default=None)
    values.finish()
    _refuse(config, architecture, window, where)
    return HfModel(
        architecture=architecture,
        **sizes,
        rotary_base=rotary_base,
        rope_type=rope_type,
        rope_factor=rope_factor,
        tied=tied,
        add_bias_linear=bias,
        dtype=_dtype(config, where),
        **moe,
    )


def _sizes(values: ConfigValues, architecture: str) -> dict[str, Any]:
    heads, hidden = values.size("num_attention_heads"), values.size("hidden_size")
    groups = values.size("num_key_value_heads", default=heads)
    width = values.size("head_dim", default=None)
    for key in _OWN_DEFAULTS.get(architecture, ()):
        if key not in values.config:
            values.problems.append(
                f"key {key!r} is missing: name it, for transformers has a default of its own"
            )
    if heads % groups:
        values.problems.append(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
        )
    if width is None and hidden % heads:
        values.problems.append(
            f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, and there is no "
            "head_dim"
        )
    return dict(
        num_layers=values.size("num_hidden_layers", MAX_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=values.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width or hidden // heads,
        layernorm_epsilon=values.number("rms_norm_eps", 1e-20, 1.0),
        vocab_size=values.size("vocab_size"),
        max_sequence_length=values.size("max_position_embeddings"),
    )


def _architecture(config: dict[str, Any], where: str) -> str:
    named, kind = config.get("architectures"), config.get("model_type")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise NotImplementedError(
            f"{where}: architecture {architecture!r} is not supported; supported are "
            + ", ".join(ARCHITECTURES)
        )
    if kind is not None and kind != ARCHITECTURES[architecture]:
        raise ValueError(
            f"{where}: model_type={kind!r} contradicts architectures=[{architecture!r}], which is "
            f"of type {ARCHITECTURES[architecture]!r}; correct the one that is wrong"
        )
    return architecture


def _experts(values: ConfigValues) -> dict[str, Any]:
    config = values.config
    one, other = config.get("num_experts"), config.get("num_local_experts")
    if None not in (one, other) and one != other:
        values.problems.append(f"num_experts={one!r} and num_local_experts={other!r} differ")
    count = values.size("num_experts" if other is None else "num_local_experts", MAX_EXPERTS)
    return dict(
        num_experts=count,
        moe_router_topk=values.size("num_experts_per_tok", count),
        moe_ffn_hidden_size=values.size("moe_intermediate_size"),
        norm_topk_prob=values.flag("norm_topk_prob"),
    )


def _dtype(config: dict[str, Any], where: str) -> torch.dtype:
    named = [config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None]
    for dtype in named:
        if not isinstance(dtype, str) or dtype not in NAMED_DTYPES:
            raise NotImplementedError(
                f"{where}: dtype {dtype!r} is not supported; use one of {', '.join(NAMED_DTYPES)}"
            )
    if len(set(named)) > 1:
        raise ValueError(f"{where}: dtype and torch_dtype are {' and '.join(named)}; keep one")
    return NAMED_DTYPES[named[0] if named else "float32"]


def _rope(values: ConfigValues) -> tuple[str, float, float]:
    """Rope type, factor and base, from either spelling; both present must agree."""
    where = values.where
    new, old = values.section("rope_parameters"), values.section("rope_scaling")
    places = [ConfigValues(place, where) for place in (values.config, new, old)]
    # The default of all these architectures in transformers is 10000.
    bases = {place.number("rope_theta", 1.0, 1e12, default=None) for place in places}
    bases = bases - {None} or {10000.0}
    if len(bases) > 1:
        raise ValueError(f"{where}: rope_theta is given as {sorted(bases)}; keep one value")
    if new and old and _scaling(new) != _scaling(old):
        raise ValueError(f"{where}: rope_parameters and rope_scaling differ; keep one of them")
    rope = _scaling(new or old)
    kind = rope.pop("rope_type")
    allowed: dict[str, dict[str, Any]] = {"default": {}, "linear": {}, "llama3": LLAMA3_ROPE}
    if not isinstance(kind, str) or kind not in allowed or (new or old).get("type", kind) != kind:
        raise NotImplementedError(
            f"{where}: rope type {(new or old).get('type', kind)!r} is not supported; supported "
            f"are {', '.join(allowed)}"
        )
    scaled = ConfigValues(rope, where)
    factor = 1.0 if kind == "default" else scaled.number("factor", 1.0, 1e6)
    rope.pop("factor", None)
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
    for part in (*places, scaled):
        values.problems += part.problems
    return kind, factor, bases.pop()


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """A rope section without its base, its type under one name."""
    named = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    return named | dict(rope_type=rope.get("rope_type") or rope.get("type") or "default")


def _refuse(config: dict[str, Any], architecture: str, window: int | None, where: str) -> None:
    """All settings that would make ``GPTModel`` another model, in one error."""
    problems = []

    def must(key: str, *values: Any) -> None:
        if key in config and config[key] not in values:
            problems.append(f"{key}={config[key]!r} (must be {values[0]!r})")

    must("hidden_act", "silu")
    must("partial_rotary_factor", 1.0, None)
    must("decoder_sparse_step", 1)
    must("mlp_only_layers", [], None)
    must("layer_types", None, ["full_attention"] * config["num_hidden_layers"])
    biases = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if architecture != "LlamaForCausalLM":
        # Megatron-Core has biases in all linear layers, or in query, key and value alone.
        problems += [f"{key}=True (must be false for {architecture})" for key in biases]
    elif len(biases) == 1:
        problems.append("attention_bias and mlp_bias must both be true or both false")
    # Mistral's configuration has no switch.
    is_used = architecture == "MistralForCausalLM" or config.get("use_sliding_window", True)
    if window is not None and is_used and window < config["max_position_embeddings"]:
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
