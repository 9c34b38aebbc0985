"""Weights of a running, sharded ``GPTModel`` from and to a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .chunk import (
    check_built_for,
    gathered_names,
    global_name,
    is_expert,
    shard_position,
    unwrap,
)
from .files import finish_folder, partial_path, start_folder
from .hf_config import HfModel
from .hf_folder import HfFolder
from .hf_parse import read_hf_config
from .hf_writer import MAX_SHARD_BYTES, HfWriter, make_file_plan, write_hf_metadata
from .mapping import Mapping
from .megatron_folder import WeightSource
from .shards import copy_into_shard, merge_shards


def load_hf(models: Sequence[torch.nn.Module], hf_dir: str | Path) -> HfModel:
    """Load a Hugging Face folder into this rank's model chunks.

    Equals loading the whole model on one rank and resharding it. Every rank reads only its own
    rows from the files; nothing is communicated. An optimizer that was built before keeps its
    own copies: call its ``reload_model_params()`` afterwards.

    Args:
        models: the chunks of this pipeline rank (one, or one per virtual stage), bare or wrapped
            (``DistributedDataParallel``, ``Float16Module``), on any device, with the local or the
            Transformer Engine spec.
        hf_dir: folder with ``config.json`` and safetensors; cast to the parameters' dtype.

    Returns:
        What the folder's ``config.json`` says.

    Raises:
        ValueError: naming the file: a folder that is incomplete or damaged, or a model that was
            built for another configuration. Nothing has been written to the model then.
        NotImplementedError: an unsupported architecture or setting, or experts in the layout of
            the legacy grouped GEMM; likewise.
    """
    folder = HfFolder(hf_dir)
    load_weights(models, folder)
    return folder.model


def load_weights(models: Sequence[torch.nn.Module], source: WeightSource) -> None:
    """As ``load_hf``, from an opened Hugging Face folder or Megatron checkpoint of any layout.

    Raises:
        ValueError: a model that was built for another configuration; it is left as it was.
        NotImplementedError: experts in the layout of the legacy grouped GEMM; likewise.
    """
    chunks = [unwrap(model) for model in models]
    for chunk in chunks:
        check_built_for(chunk, source.model, source.path)
    with torch.no_grad():
        for chunk in chunks:
            mapping = Mapping(source.model, chunk.vocab_size)
            for name, parameter in chunk.named_parameters():
                rank, size = shard_position(chunk, name)
                shard = mapping.shard(global_name(chunk, name), rank, size)
                copy_into_shard(parameter.data, shard, source.read, name)


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
        mapping = Mapping(hf_model, chunk.vocab_size)
        shapes = mapping.hf_shapes()
        for name, parameter in chunk.named_parameters():
            if _is_repeated(name, hf_model):
                continue
            _, size = shard_position(chunk, name)
            for whole, shards in _gather(chunk, name, parameter.detach()):
                specs = [mapping.shard(whole, rank, size) for rank in range(size)]
                yield from merge_shards(specs, shards, shapes).items()


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
    config of the source. One rank of every pipeline stage writes that stage's files (``out_dir``
    must be on a file system that all of them see) and holds one file in memory. The folder
    appears when complete, and on every rank's return it is there.

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
    out, source = Path(out_dir), Path(source_hf_dir)
    chunks = [unwrap(model) for model in models]

    def prepare() -> HfModel:
        hf_model = read_hf_config(source)
        for chunk in chunks:
            check_built_for(chunk, hf_model, source)
        if dist.get_rank() == 0:
            start_folder(out)
        return hf_model

    hf_model = _together(prepare)
    stored = dtype or next(chunks[0].parameters()).dtype
    writers, dtypes = _writers(chunks, hf_model)
    dtypes = dict.fromkeys(dtypes, dtype) if dtype else dtypes
    plan = make_file_plan(Mapping(hf_model).hf_shapes(), dtypes, max_shard_bytes, writers)
    writer = HfWriter(partial_path(out), plan, dtypes)
    failure: Exception | None = None

    def complete() -> None:
        if failure is not None:
            raise failure
        writer.finish()

    def publish() -> None:
        if dist.get_rank() == 0:
            model = replace(hf_model, dtype=stored)
            write_hf_metadata(partial_path(out), plan, model, source)
            finish_folder(out)

    try:
        for name, tensor in iter_hf_tensors(chunks, hf_model):
            # After a failure the others still wait in the collectives of this loop.
            if writers[name] == dist.get_rank() and failure is None:
                try:
                    writer.add(name, tensor)
                except Exception as error:
                    failure = error
        _together(complete)
        _together(publish)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(partial_path(out), ignore_errors=True)


def _writers(
    chunks: Sequence[Any], hf_model: HfModel
) -> tuple[dict[str, int], dict[str, torch.dtype]]:
    """Of every tensor its writer, the lowest rank that holds a part of it, and its dtype."""
    dtypes: dict[str, torch.dtype] = {}
    for chunk in chunks:
        mapping = Mapping(hf_model, chunk.vocab_size)
        for name, parameter in chunk.named_parameters():
            if not _is_repeated(name, hf_model):
                for whole in gathered_names(chunk, name):
                    pieces = mapping.shard(whole).pieces
                    dtypes |= {piece.name: parameter.dtype for piece in pieces}
    everyone: list[dict[str, torch.dtype]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, dtypes)
    writers = {name: rank for rank in reversed(range(len(everyone))) for name in everyone[rank]}
    return writers, {name: everyone[rank][name] for name, rank in writers.items()}


def _together(action: Callable[[], Any]) -> Any:
    """Run on every rank; if it fails on one, all raise that error."""
    failure, result = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    failures: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for rank, first in enumerate(failures):
        if isinstance(first, ValueError | NotImplementedError):
            raise type(first)(*first.args)
        if first is not None:
            raise ValueError(f"rank {rank}: {first}; nothing was kept") from first
    return result


def _is_repeated(name: str, hf_model: HfModel) -> bool:
    return hf_model.tied and name == "output_layer.weight"


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
