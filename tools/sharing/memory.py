"""What a rank holds at its peak, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_pg.data import (
    LayerSizes,
    MemoryModel,
    ModuleKinds,
    PackPlan,
    RankShare,
    ResidencyConfig,
)
from megatron_pg.parallel import kv_head_copies
from tools.sharing.dims import ModelDims
from tools.sharing.settings import Settings

# As it is when nothing is said.
RESIDENT_MODE = ResidencyConfig.mode
_MEMORY_FIELDS = (
    "rows_in_flight",
    "activation_bytes",
    "resident_bytes",
    "written_out_activation_bytes",
    "kv_bytes",
)


def stage_memory(
    waves: Sequence[PackPlan], dims: ModelDims, settings: Settings
) -> list[dict[str, Any]]:
    """Peak of every pipeline stage under 1F1B, in the wave that takes most; no recompute.

    As many of the longest row as are in flight, with a state for each segment of the row that has
    most, and the resident prompts beside them. Written out, the samples of those same rows stand in
    full, each with its prompt; they begin from no state, and nothing is resident.
    A context-parallel rank holds its share of the tokens of every row, or of their heads.
    """
    memory = layer_memory(dims, settings)
    layers, cp = dims.num_layers // settings.sizes.pp, settings.sizes.cp
    shares = [{w: wave.kept_share(w) for w in set(dims.windows)} for wave in waves]
    lens = [max(_row_lens(wave)) for wave in waves]
    stages = []
    for stage in range(settings.sizes.pp):
        peak = dict.fromkeys(_MEMORY_FIELDS, 0)
        chosen = slice(stage * layers, (stage + 1) * layers)
        held = list(zip(memory[chosen], dims.windows[chosen]))
        states = sum(m.state for m, _ in held)
        prompt_states = states + sum(m.state_grads for m, _ in held)
        activations, kv = (sum(getattr(m, name) for m, _ in held) for name in ("activations", "kv"))
        for wave, share, (longest, written_out) in zip(waves, shares, lens):
            resident = sum(m.resident(RESIDENT_MODE, share[w]) for m, w in held)
            kept = sum(share[w] * m.kept for m, w in held)
            in_flight = min(settings.sizes.pp - stage, len(wave.rows))
            values = (
                in_flight,
                in_flight * (longest // cp * activations + wave.most_segments * states),
                int(wave.prefix_tokens // cp * resident)
                + wave.num_resident_prefixes * prompt_states,
                in_flight * written_out // cp * activations,
                in_flight * longest // cp * kv + int(wave.prefix_tokens // cp * kept),
            )
            sizes = dict(zip(_MEMORY_FIELDS, values))
            peak = max(peak, sizes, key=lambda s: s["activation_bytes"] + s["resident_bytes"])
        stages.append({"stage": stage, **peak})
    return stages


def layer_memory(dims: ModelDims, settings: Settings) -> list[MemoryModel]:
    """Of a token that one rank holds, layer by layer: sequence parallelism, no recompute."""
    sizes = settings.sizes
    share = RankShare(
        tp_size=sizes.tp,
        sequence_parallel=True,
        cp_size=sizes.cp,
        kv_head_copies=kv_head_copies(*dims.heads_of_rank(sizes), sizes.cp),
    )
    own = dims.modules
    sizes_of = {"attention": dims.attention, None: None}

    def of_layer(mixer: str | None, width: int, has_experts: bool) -> MemoryModel:
        layer = LayerSizes(
            hidden_size=dims.hidden_size,
            mixer=sizes_of.get(mixer, dims.linear),
            ffn_hidden_size=width,
            gated_linear_unit=dims.gated,
            value_bytes=settings.bytes_per_value,
            experts=dims.mlps.experts if has_experts else None,
            has_qk_norms=own.has_qk_norms,
            has_rotary=own.has_rotary,
            has_norms_before=own.has_norms_before,
            has_norms_behind=own.has_norms_behind,
            modules=ModuleKinds(has_fused_activation=own.has_fused_activation),
        )
        return MemoryModel.of_layer(layer, share)

    with_experts = map(dims.mlps.has_experts, range(dims.num_layers))
    kinds = list(zip(dims.mixers, dims.mlps.shared, with_experts))
    made = {kind: of_layer(*kind) for kind in set(kinds)}
    return [made[kind] for kind in kinds]


def _row_lens(wave: PackPlan) -> list[tuple[int, int]]:
    """Of every row, its tokens and those of its samples written out; padding included in both."""
    lens = []
    for number, row in enumerate(wave.rows):
        trees = [(wave.shapes[part.group].tree, list(part.samples)) for part in row]
        logical = sum(int(tree.sample_lens[samples].sum()) for tree, samples in trees)
        padded = -(-logical // wave.pad_to_multiple) * wave.pad_to_multiple
        lens.append((wave.row_layout(number).total_tokens, padded))
    return lens
