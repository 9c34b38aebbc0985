"""Memory of a run in lines for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from .layers import layer_memory
from .memory import RESIDENT, RunMemory, StageMemory

# As the names of Megatron's settings.
_CHOICES = {"full": "full", "mlp": "selective (mlp)", "moe": "selective (moe)"} | {
    name: f"selective ({name})" for name in ("core_attn", "mla_up_proj")
}


def memory_lines(memory: RunMemory) -> Iterator[str]:
    """The fullest rank by what takes its memory, the others, recompute and a checkpoint."""
    config, stages, fullest = memory.config, memory.stages, memory.fullest
    of_stage = f" (pipeline stage {fullest.stage + 1} of {len(stages)})" if len(stages) > 1 else ""
    yield (
        f"fullest rank{of_stage}: {fullest.parameters.total:,} parameters, {fullest.num_layers} "
        f"layers, about {_gib(fullest.total)}: {_terms(fullest)}"
    )
    if len(stages) > 1:
        yield f"ranks by pipeline stage: {_totals(stages)}"
    if resident := fullest.terms.get(RESIDENT):
        bound = "up to " if memory.rows.is_bound else ""
        yield (
            f"of it resident prompts: {bound}{memory.rows.resident_tokens:,} tokens at once "
            f"({config.prefix_group.prefix_resident_mode}), about {_gib(resident)}"
        )
    yield from _recompute_lines(memory)
    is_linear = any(kind.is_linear for kind in memory.plan.layer_kinds)
    if is_linear and not memory.plan.on_cuda:
        yield "linear attention: PyTorch's rule on CPUs keeps many times what is counted here"
    if config.run.save_interval or config.run.keep_best:
        while_what = "beside the next steps" if config.run.async_save else "meanwhile"
        yield (
            f"a checkpoint: {_gib(max(stage.checkpoint for stage in stages))} of each rank, copied "
            "to its host memory (up to twice that on CUDA, where PyTorch rounds page-locked blocks "
            f"up) and written {while_what}; nothing more on its device"
        )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _terms(stage: StageMemory) -> str:
    return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in stage.terms.items())


def _totals(stages: Sequence[StageMemory]) -> str:
    """Of every stage, runs of equal ones once."""
    runs: list[tuple[str, int, int]] = []
    for stage in stages:
        total = _gib(stage.total)
        first = stage.stage
        if runs and runs[-1][0] == total:
            first = runs.pop()[1]
        runs.append((total, first, stage.stage))
    named = (
        f"{first if first == last else f'{first}-{last}'}: {total}" for total, first, last in runs
    )
    return ", ".join(named)


def _recompute_lines(memory: RunMemory) -> Iterator[str]:
    """Of every kind of layer what a token keeps in one, and what recompute would free of it."""
    kinds = Counter(memory.plan.layer_kinds)
    for kind, number in kinds.most_common():
        layer = layer_memory(memory.plan, kind)
        of_kind = f" with {kind} ({number} of {kinds.total()})" if len(kinds) > 1 else ""
        named = "; ".join(
            f"{_CHOICES[n]} {freed:,}" for n, freed in layer.freed.items() if n in _CHOICES
        )
        yield (
            f"a token keeps about {layer.activations:,} bytes in a layer{of_kind}; "
            f"recompute_granularity frees of {layer.kept_without_recompute:,}: {named}"
        )
