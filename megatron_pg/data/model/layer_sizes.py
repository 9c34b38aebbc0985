"""Widths of one decoder layer, what its modules leave undone, and the share of one rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from .heads import AttentionSizes
from .linear_sizes import LinearSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSizes:
    """Experts of a layer.

    Attributes:
        number: of all ranks.
        topk: that a token goes through.
        ffn_hidden_size: of each.
    """

    number: int
    topk: int
    ffn_hidden_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleKinds:
    """Which kernels a layer has: one that does several things keeps its input alone.

    Attributes:
        has_fused_norms: whether a norm is one; what scales is kept as well where it is not.
        has_fused_activation: whether the activation and the gate are one; what is multiplied is
            kept as well where they are not.
        gathers_latents: whether projections onto latents are divided over ranks, which gather what
            they return, and keys are turned without a kernel: Megatron-Core's local modules.
        has_fused_recurrence: whether linear attention has kernels.
    """

    has_fused_norms: bool = True
    has_fused_activation: bool = True
    gathers_latents: bool = False
    has_fused_recurrence: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSizes:
    """One decoder layer.

    Attributes:
        hidden_size: width of the residual stream.
        mixer: heads of its attention, or of what stands in its place; None without either.
        ffn_hidden_size: width of the MLP that every token goes through: shared experts, where the
            layer has experts; 0 without one.
        gated_linear_unit: whether MLPs have a gate.
        value_bytes: of an activation, 2 for bf16.
        experts: None without.
        has_qk_norms: whether queries and keys, or their latents, are normalised.
        has_rotary: whether positions turn queries and keys.
        has_norms_before: whether what mixer and MLP read is normalised,
        has_norms_behind: and what they return.
        modules: that compute it.
    """

    hidden_size: int
    mixer: AttentionSizes | LinearSizes | None
    ffn_hidden_size: int
    gated_linear_unit: bool
    value_bytes: int
    experts: ExpertSizes | None = None
    has_qk_norms: bool = False
    has_rotary: bool = True
    has_norms_before: bool = True
    has_norms_behind: bool = False
    modules: ModuleKinds = field(default_factory=ModuleKinds)

    @property
    def num_parts(self) -> int:
        """Of mixer and MLP, those that it has: what adds to the residual stream."""
        has_mlp = bool(self.ffn_hidden_size) or self.experts is not None
        return (self.mixer is not None) + has_mlp


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """What one rank has of a layer; a token is one of its part of the row.

    Attributes:
        tp_size: ranks that divide heads and widths.
        sequence_parallel: whether they divide the tokens between, too.
        cp_size: ranks that divide the tokens of a row, and the heads of its attention.
        kv_head_copies: how often each key head is sent among these.
        expert_tp_size: ranks that divide an expert's widths; ``tp_size`` when None.
    """

    tp_size: int = 1
    sequence_parallel: bool = False
    cp_size: int = 1
    kv_head_copies: int = 1
    expert_tp_size: int | None = None

    @property
    def token_shards(self) -> int:
        """Ranks among which tokens are divided between attention and MLP."""
        return self.tp_size if self.sequence_parallel else 1
