"""Sizes of a model's layers, and what a token keeps in them."""

from .heads import AttentionSizes
from .layer_kinds import (
    HYBRID_SYMBOLS,
    LayerKind,
    active_ffn_hidden_size,
    expert_pattern,
    layer_kinds,
    linear_pattern,
)
from .layer_sizes import ExpertSizes, LayerSizes, ModuleKinds, RankShare
from .linear_sizes import LinearSizes
from .memory import MemoryModel, ResidentMode

__all__ = [
    "AttentionSizes",
    "ExpertSizes",
    "HYBRID_SYMBOLS",
    "LayerKind",
    "LayerSizes",
    "LinearSizes",
    "MemoryModel",
    "ModuleKinds",
    "RankShare",
    "ResidentMode",
    "active_ffn_hidden_size",
    "expert_pattern",
    "layer_kinds",
    "linear_pattern",
]
