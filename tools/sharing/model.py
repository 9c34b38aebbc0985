"""Sizes of a decoder, read from a Hugging Face config or from Megatron-LM's arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pg.data import CostModel, MemoryModel

# Models of these types have two MLP matrices a layer, all others a gate as third. Types whose
# configs have other names for their sizes (opt, bloom, falcon, gpt_neo) are not read at all.
UNGATED = {
    "biogpt",
    "codegen",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "nemotron",
    "persimmon",
    "phi",
    "starcoder2",
}

_HF_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
_GPT2_KEYS = ("n_layer", "n_embd", "n_head", "vocab_size")
_MEGATRON_KEYS = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Sizes that decide FLOPs and memory.

    Attributes:
        ffn_hidden_size: width of the MLP that one token goes through: of all its experts together.
        gated: whether the MLP has a gate.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    gated: bool

    @property
    def cost_model(self) -> CostModel:
        """Forward FLOPs."""
        return CostModel.from_model_dims(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            ffn_hidden_size=self.ffn_hidden_size,
            vocab_size=self.vocab_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            gated_linear_unit=self.gated,
        )

    def memory_model(self, value_bytes: int, tp_size: int) -> MemoryModel:
        """Memory of one rank under sequence parallelism, nothing recomputed."""
        return MemoryModel.from_model_dims(
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            gated_linear_unit=self.gated,
            value_bytes=value_bytes,
            tp_size=tp_size,
            sequence_parallel=True,
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
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); save the model's config anew") from error
    values = values.get("text_config", values)
    is_hf = "num_hidden_layers" in values or "n_layer" in values
    try:
        return _from_hf(values) if is_hf else _from_megatron(values)
    except KeyError as error:
        keys = _MEGATRON_KEYS if not is_hf else _GPT2_KEYS if "n_layer" in values else _HF_KEYS
        missing = [key for key in keys if key not in values]
        raise ValueError(
            f"{file} (model_type={values.get('model_type')!r}) has no {', '.join(missing)}, which "
            "FLOPs and memory depend on; name an args.json with Megatron-LM's names: num_layers, "
            "hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, vocab_size, "
            "swiglu"
        ) from error


def _from_hf(values: dict[str, Any]) -> ModelDims:
    if "n_layer" in values:
        values = {
            "num_hidden_layers": values["n_layer"],
            "hidden_size": values["n_embd"],
            "num_attention_heads": values["n_head"],
            "intermediate_size": values.get("n_inner") or 4 * values["n_embd"],
            **values,
        }
    heads = values["num_attention_heads"]
    if values.get("num_experts_per_tok"):
        expert = values.get("moe_intermediate_size") or values["intermediate_size"]
        ffn = expert * values["num_experts_per_tok"]
        ffn += values.get("shared_expert_intermediate_size") or 0
    else:
        ffn = values["intermediate_size"]
    return ModelDims(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=values.get("num_key_value_heads") or heads,
        kv_channels=values.get("head_dim") or values["hidden_size"] // heads,
        vocab_size=values["vocab_size"],
        gated=values.get("model_type") not in UNGATED,
    )


def _from_megatron(values: dict[str, Any]) -> ModelDims:
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    gated = bool(values.get("swiglu") or values.get("gated_linear_unit"))
    ffn = values.get("ffn_hidden_size") or (
        int(4 * hidden * 2 / 3) // 64 * 64 if gated else 4 * hidden
    )
    if values.get("num_experts"):
        ffn = (values.get("moe_ffn_hidden_size") or ffn) * values.get("moe_router_topk", 2)
        ffn += values.get("moe_shared_expert_intermediate_size") or 0
    groups = values.get("num_query_groups") if values.get("group_query_attention", True) else None
    return ModelDims(
        num_layers=values["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups or heads,
        kv_channels=values.get("kv_channels") or hidden // heads,
        vocab_size=values.get("padded_vocab_size") or values["vocab_size"],
        gated=gated,
    )
