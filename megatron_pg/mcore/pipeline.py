"""Which layers Megatron-Core gives to every stage of a pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from ..data import layer_kinds
from ..parallel import PipelineSplit


def layers_per_chunk(config: TransformerConfig) -> list[list[int]]:
    """Layers of every model chunk of every pipeline rank.

    Raises:
        AssertionError: Megatron-Core's, on layers that do not divide.
    """
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return [
            [sum(kind == LayerType.decoder for kind in chunk) for chunk in chunks]
            for chunks in layout.layout
        ]
    vpp = config.virtual_pipeline_model_parallel_size
    return [
        [
            get_num_layers_to_build(config, vp_stage=stage if vpp else None, pp_rank=rank)
            for stage in range(vpp or 1)
        ]
        for rank in range(config.pipeline_model_parallel_size)
    ]


def layers_per_stage(config: TransformerConfig) -> list[int]:
    """Layers on every pipeline rank, of all its chunks.

    Raises:
        AssertionError: as ``layers_per_chunk``.
    """
    return [sum(chunks) for chunks in layers_per_chunk(config)]


def expert_layers_per_stage(config: TransformerConfig) -> list[int]:
    """Of ``layers_per_stage``, those with experts."""
    kinds = layer_kinds(config)
    return [
        sum(kinds[n].has_experts for chunk in stage for n in chunk)
        for stage in layers_of_stages(config)
    ]


def layers_of_stages(config: TransformerConfig) -> list[list[list[int]]]:
    """Numbers of the layers, from 0, in every chunk of every pipeline rank.

    Raises:
        AssertionError: as ``layers_per_chunk``.
    """
    chunks, left = layers_per_chunk(config), iter(range(config.num_layers))
    stages: list[list[list[int]]] = [[] for _ in chunks]
    # Layers go through the first chunks of all stages, then through the second ones.
    for chunk in range(len(chunks[0])):
        for stage, of_rank in zip(stages, chunks):
            stage.append(list(itertools.islice(left, of_rank[chunk])))
    return stages


def stage_problems(config: TransformerConfig) -> Iterator[str]:
    """What is wrong with layers that are dealt out otherwise than evenly."""
    said = PipelineSplit.from_config(config).settings()
    said = {"num_layers": config.num_layers, **said}
    told = ", ".join(f"{name}={value!r}" for name, value in said.items())
    try:
        chunks = layers_per_chunk(config)
    except AssertionError as error:
        yield f"{told}: {error}; choose other pipeline sizes"
        return
    total, stages = sum(map(sum, chunks)), [sum(of_rank) for of_rank in chunks]
    # The first chunk has the embedding and the last one the loss.
    between = [number for of_chunk in zip(*chunks) for number in of_chunk][1:-1]
    if total != config.num_layers or min(between, default=1) < 1:
        yield (
            f"{told}: pipeline stages of {stages} layers; give every chunk between the first and "
            "the last one a layer, and all of them together num_layers"
        )
