"""What a rank holds at its peak, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_pg.data import PackPlan, ResidencyConfig
from tools.sharing.model import ModelDims
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

    As many of the longest row as are in flight, and the resident prompts beside them. Written out,
    the samples of those same rows stand in full, each with its prompt, and nothing is resident.
    """
    memory = dims.memory_model(settings.bytes_per_value, settings.sizes.tp)
    layers = dims.num_layers // settings.sizes.pp
    lens = [max(_row_lens(wave)) for wave in waves]
    stages = []
    for stage in range(settings.sizes.pp):
        peak = dict.fromkeys(_MEMORY_FIELDS, 0)
        for wave, (longest, written_out) in zip(waves, lens):
            in_flight = min(settings.sizes.pp - stage, len(wave.rows))
            values = (
                in_flight,
                in_flight * longest * layers * memory.activations,
                int(wave.prefix_tokens * layers * memory.resident(RESIDENT_MODE)),
                in_flight * written_out * layers * memory.activations,
                (in_flight * longest * memory.kv + wave.prefix_tokens * memory.kept) * layers,
            )
            sizes = dict(zip(_MEMORY_FIELDS, values))
            peak = max(peak, sizes, key=lambda s: s["activation_bytes"] + s["resident_bytes"])
        stages.append({"stage": stage, **peak})
    return stages


def _row_lens(wave: PackPlan) -> list[tuple[int, int]]:
    """Of every row, its tokens and those of its samples written out; padding included in both."""
    lens = []
    for number, row in enumerate(wave.rows):
        trees = [(wave.shapes[part.group].tree, list(part.samples)) for part in row]
        logical = sum(int(tree.sample_lens[samples].sum()) for tree, samples in trees)
        padded = -(-logical // wave.pad_to_multiple) * wave.pad_to_multiple
        lens.append((wave.row_layout(number).total_tokens, padded))
    return lens
