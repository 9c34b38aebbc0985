"""Sizes of a decoder, read from a Hugging Face config or from Megatron-LM's arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pg.data import parse_json_text, shorten
from tools.sharing.dims import ModelDims, check_sizes
from tools.sharing.hybrids import HF_HYBRIDS, hf_pattern
from tools.sharing.layers import (
    HF_LINEAR,
    hf_attention,
    hf_kinds,
    hf_windows,
    linear_sizes,
    megatron_attention,
    megatron_kinds,
    megatron_windows,
)
from tools.sharing.mlps import hf_mlps, megatron_mlps
from tools.sharing.modules import hf_modules, megatron_modules
from tools.sharing.support import training_model

if TYPE_CHECKING:
    from megatron_pg.checkpoint import HfModel

# Of families that training does not hold, and of all where Megatron-Core is missing: counted as
# transformers builds them (see the tests). Models of these types have a gate as third matrix of
# their MLPs,
GATED = {
    *("bitnet", "cohere", "deepseek_v2", "deepseek_v3", "ernie4_5", "flex_olmo", "gemma"),
    *("gemma3_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text"),
    *("glm4v_text", "gpt_oss", "granite", "granitemoe", "olmo3"),
    *("granitemoeshared", "helium", "internlm3", "llama", "minicpm3", "minimax_m2", "ministral3"),
    *("mistral", "mistral4", "mixtral", "molmo2_text", "olmo", "olmo2", "olmoe", "phi3", "phimoe"),
    *("qwen2", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_moe"),
    *("qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss", "smollm3", "solar_open", "stablelm"),
    "youtu",
    *HF_LINEAR,
}
# models of these have two. Types whose configs have other names for their sizes (opt, bloom,
# falcon, gpt_neo) are not read at all.
UNGATED = {
    *("biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "nemotron", "persimmon"),
    *("phi", "starcoder2", *HF_HYBRIDS),
}

# Lists have an entry for each.
_MOST_LAYERS = 10_000
_HF_KEYS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    "vocab_size",
)
_GPT2_KEYS = ("n_layer", "n_embd", "n_head", "vocab_size")
_MEGATRON_KEYS = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
# What arguments leave out.
_FIELDS = (
    *("gated_linear_unit", "activation_func_clamp_value", "glu_linear_offset"),
    *("has_norms_over_heads", "has_pre_layernorms", "has_post_layernorms"),
)


def read_model(path: Path) -> ModelDims:
    """Sizes from ``config.json`` (Hugging Face) or ``args.json`` (Megatron-LM), or such a file.

    Raises:
        ValueError: if there is no such file, or it is no JSON, or lacks sizes.
    """
    candidates = [path / "config.json", path / "args.json"] if path.is_dir() else [path]
    file = next((f for f in candidates if f.is_file()), None)
    if file is None:
        raise ValueError(f"{path} holds no config.json and no args.json; name the model's folder")
    try:
        values = parse_json_text(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is no JSON ({error}); save the model's config anew") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object; save the model's config anew")
    held, refusal = training_model(values, str(file))
    values = _of_text(values, str(file))
    is_hf = any(key in values for key in ("num_hidden_layers", "n_layer"))
    is_hf |= values.get("model_type") in HF_HYBRIDS
    if held is not None and is_hf:
        values, is_hf = _arguments(held), False
    try:
        if is_hf and (pattern := hf_pattern(values)) is not None:
            # Newer files name the layers alone.
            values = {"num_hidden_layers": len(pattern), **values}
        dims = _from_hf(values) if is_hf else _from_megatron(values)
        check_sizes(dims)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{file} (model_type={values.get('model_type')!r}): {error}") from error
    except (TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{file} has sizes that are no numbers ({error}); correct it") from error
    except KeyError as error:
        keys = _MEGATRON_KEYS if not is_hf else _GPT2_KEYS if "n_layer" in values else _HF_KEYS
        known = {*values, *(["vocab_size"] if "padded_vocab_size" in values else [])}
        missing = [key for key in keys if key not in known] or [str(error.args[0])]
        raise ValueError(
            f"{file} (model_type={values.get('model_type')!r}) has no {', '.join(missing)}, which "
            "FLOPs and memory depend on; name an args.json with Megatron-LM's names: num_layers, "
            "hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, vocab_size, "
            "swiglu"
        ) from error
    return replace(dims, training_refusal=refusal)


def _of_text(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The part that describes the decoder, once nothing in it keeps the rest from being read."""
    text = values.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ValueError(f"{where} has text_config={shorten(text)}, must be an object; correct it")
    values = values if text is None else text
    if not isinstance(kind := values.get("model_type"), str | None):
        raise ValueError(f"{where} has model_type={shorten(kind)}, must be text; correct it")
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        number = values.get(name)
        if isinstance(number, int) and number > _MOST_LAYERS:
            most = f"at most {_MOST_LAYERS} are read; correct it"
            raise ValueError(f"{where} has {name}={shorten(number)}, {most}")
    return values


def _arguments(model: HfModel) -> dict[str, Any]:
    """A family that training holds is counted by its own description."""
    sizes = dict(vocab_size=model.vocab_size, max_position_embeddings=model.max_sequence_length)
    # Megatron-LM's arguments name some gates only, and few norms.
    config = model.transformer_config()
    own = {name: config[name] for name in _FIELDS if name in config}
    return model.megatron_arguments() | sizes | own


def _from_hf(values: dict[str, Any]) -> ModelDims:
    if "n_layer" in values:
        values = {
            "num_hidden_layers": values["n_layer"],
            "hidden_size": values["n_embd"],
            "num_attention_heads": values["n_head"],
            "intermediate_size": values.get("n_inner") or 4 * values["n_embd"],
            "max_position_embeddings": values.get("n_positions"),
            **values,
        }
    mlps = hf_mlps(values)
    attention, kind = hf_attention(values), values.get("model_type")
    if kind not in GATED | UNGATED:
        raise NotImplementedError(
            "it is not known what layers of this type hold; name an args.json with the sizes of an "
            "ordinary decoder that costs the same"
        )
    windows, kinds = hf_windows(values), hf_kinds(values)
    return ModelDims(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        mlps=mlps,
        attention=attention,
        windows=windows,
        linear=linear_sizes(values, kinds, is_hf=True),
        mixers=tuple(of_layer.mixer for of_layer in kinds),
        vocab_size=values["vocab_size"],
        gated=kind in GATED,
        modules=hf_modules(values),
        max_positions=values.get("max_position_embeddings"),
    )


def _from_megatron(values: dict[str, Any]) -> ModelDims:
    hidden = values["hidden_size"]
    gated = bool(values.get("swiglu") or values.get("gated_linear_unit"))
    dense = values.get("ffn_hidden_size") or (
        int(4 * hidden * 2 / 3) // 64 * 64 if gated else 4 * hidden
    )
    mlps = megatron_mlps(values, dense)
    kinds = megatron_kinds(values)
    return ModelDims(
        num_layers=values["num_layers"],
        hidden_size=hidden,
        mlps=mlps,
        attention=megatron_attention(values),
        windows=megatron_windows(values),
        linear=linear_sizes(values, kinds, is_hf=False),
        mixers=tuple(kind.mixer for kind in kinds),
        vocab_size=values.get("padded_vocab_size") or values["vocab_size"],
        gated=gated,
        modules=megatron_modules(values),
        max_positions=values.get("max_position_embeddings"),
    )
