"""How many tokens a row should hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_pg import PrefixTree
from tools.sharing.dims import ModelDims
from tools.sharing.memory import RESIDENT_MODE, layer_memory
from tools.sharing.settings import Settings


def recommend_max_tokens(trees: Sequence[PrefixTree], dims: ModelDims, settings: Settings) -> int:
    """Room for the largest group, or what the memory holds where that is less."""
    largest = max(tree.unique_tokens for tree in trees)
    budget = -(-largest // 1024) * 1024
    if settings.activation_gib is not None:
        stages = list(_stages(dims, settings))
        held = _tokens_held(max(row for row, _ in stages), settings)
        if held < largest:
            # Groups are divided, and prompts of up to one row's tokens are resident beside them.
            held = _tokens_held(max(row + resident for row, resident in stages), settings)
        budget = min(budget, held)
    multiple = settings.sizes.row_multiple
    return -(-budget // multiple) * multiple


def _stages(dims: ModelDims, settings: Settings) -> Iterator[tuple[float, float]]:
    """Bytes that a token takes on every pipeline stage: of its rows in flight, and resident."""
    memory, pp = layer_memory(dims, settings), settings.sizes.pp
    number = dims.num_layers // pp
    for stage in range(pp):
        layers = memory[stage * number : (stage + 1) * number]
        # The first stage keeps one row for every stage, each after it one less.
        row = sum(layer.activations for layer in layers) * (pp - stage)
        yield row, sum(layer.resident(RESIDENT_MODE) for layer in layers)


def _tokens_held(bytes_per_token: float, settings: Settings) -> int:
    """Tokens of a row that the memory holds, at so many bytes for each that a rank has."""
    assert settings.activation_gib is not None
    held = int(settings.activation_gib * 2**30 / bytes_per_token * settings.sizes.cp)
    multiple = settings.sizes.row_multiple
    return max(held // multiple * multiple, multiple)
