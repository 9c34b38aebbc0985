"""Sizes of a decoder, read from a Hugging Face config or from Megatron-LM's arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pg.data import AttentionSizes, CostModel, MemoryModel
from megatron_pg.parallel import ModelSizes
from tools.sharing.layers import (
    hf_attention,
    hf_mlps,
    hf_windows,
    megatron_attention,
    megatron_mlps,
    megatron_windows,
)
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
}
# models of these have two. Types whose configs have other names for their sizes (opt, bloom,
# falcon, gpt_neo) are not read at all.
UNGATED = {
    *("biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "nemotron", "persimmon"),
    *("phi", "starcoder2"),
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
        ffn_hidden_size: width of the widest MLP that one token goes through: of all its experts
            together, shared ones included.
        ffn_hidden_sizes: the sum of these widths over all layers.
        mlp_widths: what tensor parallelism divides, by name.
        attention: heads and projections.
        windows: of every layer, keys that a token sees before itself; None sees all.
        gated: whether the MLP has a gate.
        max_positions: longest sample that the model was made for, when it is said.
        training_refusal: why training takes no such model; None when it does or nothing is known.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    ffn_hidden_sizes: int
    mlp_widths: dict[str, int]
    attention: AttentionSizes
    windows: tuple[int | None, ...]
    vocab_size: int
    gated: bool
    max_positions: int | None = field(default=None, compare=False)
    training_refusal: str | None = field(default=None, compare=False)

    @property
    def sizes(self) -> ModelSizes:
        """What parallel ranks divide."""
        return ModelSizes(
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            num_layers=self.num_layers,
            widths=self.mlp_widths,
        )

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.attention.num_heads

    @property
    def num_query_groups(self) -> int:
        """Key and value heads."""
        return self.attention.num_kv_heads

    @property
    def cost_model(self) -> CostModel:
        """Forward FLOPs."""
        matrices = 3 if self.gated else 2
        model = CostModel.from_attention(
            self.attention,
            self.num_layers,
            self.hidden_size,
            matrices * self.hidden_size * self.ffn_hidden_sizes,
            self.vocab_size,
        )
        return model.within_windows(self.windows)

    def memory_model(self, value_bytes: int, tp_size: int) -> MemoryModel:
        """Memory of one rank under sequence parallelism, nothing recomputed."""
        return MemoryModel.from_model_dims(
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.attention.num_heads,
            num_query_groups=self.attention.num_kv_heads,
            kv_channels=self.attention.head_dim,
            value_channels=self.attention.value_dim,
            latent_channels=self.attention.latent_dim,
            kept_channels=self.attention.kept_dim(tp_size, True),
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
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object; save the model's config anew")
    held, refusal = training_model(values, str(file))
    values = values.get("text_config", values)
    is_hf = "num_hidden_layers" in values or "n_layer" in values
    if held is not None and is_hf:
        values, is_hf = _arguments(held), False
    try:
        dims = _from_hf(values) if is_hf else _from_megatron(values)
        _check_sizes(dims)
    except NotImplementedError as error:
        raise ValueError(f"{file} (model_type={values.get('model_type')!r}): {error}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file} has sizes that are no numbers ({error}); correct it") from error
    except KeyError as error:
        keys = _MEGATRON_KEYS if not is_hf else _GPT2_KEYS if "n_layer" in values else _HF_KEYS
        missing = [key for key in keys if key not in values] or [str(error.args[0])]
        raise ValueError(
            f"{file} (model_type={values.get('model_type')!r}) has no {', '.join(missing)}, which "
            "FLOPs and memory depend on; name an args.json with Megatron-LM's names: num_layers, "
            "hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, vocab_size, "
            "swiglu"
        ) from error
    return replace(dims, training_refusal=refusal)


def _arguments(model: HfModel) -> dict[str, Any]:
    """A family that training holds is counted by its own description."""
    sizes = dict(vocab_size=model.vocab_size, max_position_embeddings=model.max_sequence_length)
    # Megatron-LM's arguments name some gates only.
    gate = dict(gated_linear_unit=model.transformer_config()["gated_linear_unit"])
    return model.megatron_arguments() | sizes | gate


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
    layers, widths = hf_mlps(values)
    attention, kind = hf_attention(values), values.get("model_type")
    if kind not in GATED | UNGATED:
        raise NotImplementedError(
            "it is not known what layers of this type hold; name an args.json with the sizes of an "
            "ordinary decoder that costs the same"
        )
    return ModelDims(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=max(layers),
        ffn_hidden_sizes=sum(layers),
        mlp_widths=widths,
        attention=attention,
        windows=hf_windows(values),
        vocab_size=values["vocab_size"],
        gated=kind in GATED,
        max_positions=values.get("max_position_embeddings"),
    )


def _from_megatron(values: dict[str, Any]) -> ModelDims:
    hidden = values["hidden_size"]
    gated = bool(values.get("swiglu") or values.get("gated_linear_unit"))
    dense = values.get("ffn_hidden_size") or (
        int(4 * hidden * 2 / 3) // 64 * 64 if gated else 4 * hidden
    )
    layers, widths = megatron_mlps(values, dense)
    return ModelDims(
        num_layers=values["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=max(layers),
        ffn_hidden_sizes=sum(layers),
        mlp_widths=widths,
        attention=megatron_attention(values),
        windows=megatron_windows(values),
        vocab_size=values.get("padded_vocab_size") or values["vocab_size"],
        gated=gated,
        max_positions=values.get("max_position_embeddings"),
    )


def _check_sizes(dims: ModelDims) -> None:
    sizes = {
        "num_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
        "vocab_size": dims.vocab_size,
        "num_attention_heads": dims.num_attention_heads,
        "num_query_groups": dims.num_query_groups,
        "head size": min(dims.attention.head_dim, dims.attention.value_dim),
        **dims.mlp_widths,
    }
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise NotImplementedError(f"{name}={size!r} must be an integer of at least 1")
    if dims.num_attention_heads % dims.num_query_groups:
        raise NotImplementedError(
            f"num_attention_heads={dims.num_attention_heads} is no multiple of "
            f"num_query_groups={dims.num_query_groups}"
        )
