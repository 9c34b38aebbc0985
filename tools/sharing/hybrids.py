"""Layers of hybrids, each a mixer or an MLP: what a pattern of symbols says of every one."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from megatron_pg.data import HYBRID_SYMBOLS, LayerKind, LinearSizes, layer_kinds

# Types of hybrids, all of whose MLPs have two matrices.
HF_HYBRIDS = {"nemotron_h"}
# Of Mamba-2 layers: TransformerConfig's names, which are Megatron-LM's, and config.json's.
MAMBA_KEYS = {
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
}


def hf_pattern(values: Mapping[str, Any]) -> str | None:
    """Symbols of the layers of a Hugging Face config; None of a decoder.

    Raises:
        ValueError: if its layers are not named, or one by a name that is none.
    """
    if values.get("model_type") not in HF_HYBRIDS:
        return None
    pattern = values.get("hybrid_override_pattern")
    names = values.get("layers_block_type") or values.get("layer_types")
    if names is None and isinstance(pattern, str):
        return pattern
    if not isinstance(names, list) or not all(name in HYBRID_SYMBOLS for name in names):
        raise ValueError(
            f"layers_block_type={str(names)[:80]}: it must name every layer, one of "
            f"{', '.join(HYBRID_SYMBOLS)}; correct it"
        )
    return "".join(HYBRID_SYMBOLS[name] for name in names)


def megatron_pattern(values: Mapping[str, Any]) -> str | None:
    """The same of Megatron-LM's arguments."""
    pattern = values.get("hybrid_layer_pattern") or values.get("hybrid_override_pattern")
    return None if pattern is None else str(pattern)


def hybrid_kinds(pattern: str, num_layers: int) -> list[LayerKind]:
    """Of every layer.

    Raises:
        NotImplementedError: on a symbol that is no layer of packed rows.
        ValueError: if these are not as many as ``num_layers``.
    """
    kinds = layer_kinds(None, pattern)
    if len(kinds) != num_layers:
        raise ValueError(
            f"its pattern {pattern!r:.80} names {len(kinds)} layers, its number of layers is "
            f"{num_layers}; correct one of them"
        )
    return kinds


def mamba_sizes(values: Mapping[str, Any], *, is_hf: bool) -> LinearSizes:
    """Of all Mamba-2 layers of a model.

    Raises:
        ValueError: on a size that is none.
    """
    found = {ours: values[hf if is_hf else ours] for ours, hf in MAMBA_KEYS.items()}
    for name, size in found.items():
        # Megatron-LM's own default, which is reckoned from the others.
        is_left_out = name == "mamba_num_heads" and size is None and not is_hf
        if not is_left_out and (type(size) is not int or size < 1):
            told = MAMBA_KEYS[name] if is_hf else name
            raise ValueError(f"{told}={size!r} must be an integer of at least 1; correct it")
    config = SimpleNamespace(hidden_size=values["hidden_size"], **found)
    return LinearSizes.from_config(config, "state_space")
