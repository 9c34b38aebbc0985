"""Weights of a running, sharded ``GPTModel`` to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import on_all_ranks
from .description import HfModel, read_hf_config
from .folders import (
    MAX_SHARD_BYTES,
    CarriedTensors,
    HfWriter,
    make_weight_files,
    open_carried,
    write_hf_metadata,
)
from .load import (
    check_built_for,
    gathered_names,
    is_expert,
    named_weights,
    shard_position,
    unwrap,
)
from .new_folder import NewFolder, partial_path
from .table import HEAD, Merger

T = TypeVar("T")


def iter_hf_tensors(
    models: Sequence[torch.nn.Module], hf_model: HfModel
) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors of this pipeline stage, on every one of its ranks.

    Collective over the tensor-parallel (and expert-parallel) group; one parameter is gathered at
    a time. The padding of the vocabulary is cut off; a tied output layer is not repeated.

    Yields:
        Name and tensor, in the model's order, on the parameters' device, in their dtype.

    Raises:
        ValueError: a model that ``hf_model`` does not describe, before the first tensor.
        NotImplementedError: experts in the layout of the legacy grouped GEMM; likewise.
    """
    for model in models:
        chunk = unwrap(model)
        check_built_for(chunk, hf_model, hf_model.architecture)
        table = hf_model.weight_table(chunk.vocab_size)
        merger = Merger(table.hf_shapes())
        for name, parameter in named_weights(chunk):
            if _is_repeated(name, hf_model):
                continue
            _, size = shard_position(chunk, name, parameter)
            for whole, shards in _gather(chunk, name, parameter.detach()):
                specs = [table.shard(whole, rank, size) for rank in range(size)]
                yield from merger.add(specs, shards[:size]).items()


def export_hf(
    models: Sequence[torch.nn.Module],
    out_dir: str | Path,
    source_hf_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that ``transformers`` and inference engines load. Collective over all ranks.

    Sharded safetensors with an index, ``config.json``, tokenizer, chat template and generation
    config of the source, and its tensors of layers that are not built. One rank of every pipeline
    stage writes that stage's files (``out_dir`` must be on a file system that all of them see) and
    holds one file in memory. The folder appears when complete, and on every rank's return it is
    there.

    Args:
        models: as in ``load_hf``.
        out_dir: must not exist, or be empty.
        source_hf_dir: folder whose configuration and tokenizer the model has.
        dtype: of the written weights; None: each parameter's own.
        max_shard_bytes: largest file, unless one tensor is larger.

    Raises:
        ValueError: on every rank, with the file: an output folder that holds something, no
            permission, a full disk, a model that is not the source's. Nothing is left behind.
        NotImplementedError: on every rank: an unsupported architecture or setting of the source,
            or experts in the layout of the legacy grouped GEMM. Nothing is left behind.
    """
    own: list[NewFolder] = []
    chunks = [unwrap(model) for model in models]
    try:
        _export(chunks, Path(out_dir), Path(source_hf_dir), dtype, max_shard_bytes, own)
    finally:
        for folder in own:
            folder.close()


def _export(
    chunks: Sequence[Any],
    out: Path,
    source: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    own: list[NewFolder],
) -> None:
    """``export_hf``; the first rank's folder is in ``own`` as soon as it is begun."""

    def prepare() -> tuple[HfModel, CarriedTensors]:
        hf_model = read_hf_config(source)
        for chunk in chunks:
            check_built_for(chunk, hf_model, source)
        carried = open_carried(source, hf_model)
        if dist.get_rank() == 0:
            own.append(NewFolder(out))
        return hf_model, carried

    hf_model, carried = _together(prepare)
    stored = dtype or next(chunks[0].parameters()).dtype
    writers, dtypes = _writers(chunks, hf_model)
    table = hf_model.weight_table()
    dtypes = table.hf_dtypes(dtype) if dtype else dtypes
    # What is of no chunk, the first rank copies.
    dtypes, shapes = dtypes | carried.dtypes, table.hf_shapes() | carried.shapes
    writers |= dict.fromkeys(carried.shapes, 0)
    files = make_weight_files(shapes, dtypes, max_shard_bytes, writers)
    writer = HfWriter(partial_path(out), files, dtypes)
    failure: Exception | None = None

    def complete() -> None:
        if failure is not None:
            raise failure
        for name in carried.shapes if dist.get_rank() == 0 else ():
            writer.add(name, carried.read(name))
        writer.finish()

    def publish() -> None:
        for folder in own:
            model = replace(hf_model, dtype=stored)
            write_hf_metadata(folder.partial, files, model, source)
            folder.publish()

    for name, tensor in iter_hf_tensors(chunks, hf_model):
        # After a failure the others still wait in the collectives of this loop.
        if writers[name] == dist.get_rank() and failure is None:
            try:
                writer.add(name, tensor)
            except Exception as error:
                failure = error
    _together(complete)
    _together(publish)


def _writers(
    chunks: Sequence[Any], hf_model: HfModel
) -> tuple[dict[str, int], dict[str, torch.dtype]]:
    """Of every tensor its writer, the lowest rank that holds a part of it, and its dtype."""
    dtypes: dict[str, torch.dtype] = {}
    for chunk in chunks:
        table = hf_model.weight_table(chunk.vocab_size)
        for name, parameter in named_weights(chunk):
            if not _is_repeated(name, hf_model):
                for whole in gathered_names(chunk, name):
                    pieces = table.shard(whole).pieces
                    dtypes |= {piece.name: parameter.dtype for piece in pieces}
    everyone: list[dict[str, torch.dtype]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, dtypes)
    writers = {name: rank for rank in reversed(range(len(everyone))) for name in everyone[rank]}
    return writers, {name: everyone[rank][name] for name, rank in writers.items()}


def _together(action: Callable[[], T]) -> T:
    """``on_all_ranks``, where a failure to write is the user's to mend."""

    def explained() -> T:
        try:
            return action()
        except OSError as error:
            raise ValueError(f"rank {dist.get_rank()}: {error}; nothing was kept") from error

    return on_all_ranks(explained)


def _is_repeated(name: str, hf_model: HfModel) -> bool:
    return hf_model.tied and name == HEAD


def _gather(chunk: Any, name: str, shard: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """Global name and all tensor-parallel shards; one pair per expert-parallel rank."""
    groups = chunk.pg_collection
    shards = _all_gather(shard, groups.expt_tp if is_expert(name) else groups.tp)
    names = gathered_names(chunk, name)
    if len(names) == 1:
        yield names[0], shards
        return
    for whole, stacked in zip(names, _all_gather(torch.stack(shards), groups.ep)):
        yield whole, list(stacked)


def _all_gather(tensor: Tensor, group: Any) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered
