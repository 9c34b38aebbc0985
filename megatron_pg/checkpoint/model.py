"""Weights of a running, sharded ``GPTModel`` from and to a Hugging Face folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .files import finish_folder, partial_path, start_folder
from .hf_config import HfModel
from .hf_folder import HfFolder
from .hf_parse import read_hf_config
from .hf_writer import MAX_SHARD_BYTES, HfWriter, make_file_plan, write_hf_metadata
from .mapping import FUSED_NORMS, Mapping
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
    chunks = [_unwrap(model) for model in models]
    for chunk in chunks:
        _check_built_for(chunk, source.model, source.path)
    with torch.no_grad():
        for chunk in chunks:
            mapping = Mapping(source.model, chunk.vocab_size)
            for name, parameter in chunk.named_parameters():
                rank, size = _shard_position(chunk, name)
                shard = mapping.shard(_global_name(chunk, name), rank, size)
                copy_into_shard(parameter.data, shard, source.read, name)


def iter_hf_tensors(
    models: Sequence[torch.nn.Module], hf_model: HfModel
) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors of this pipeline stage, on every one of its ranks.

    Collective over the tensor-parallel (and expert-parallel) group; one parameter is gathered at
    a time. The padding of the vocabulary is cut off; a tied output layer is not repeated.

    Yields:
        Name and tensor, in the model's order, on the parameters' device, in their dtype.
    """
    for model in models:
        chunk = _unwrap(model)
        mapping = Mapping(hf_model, chunk.vocab_size)
        shapes = mapping.hf_shapes()
        for name, parameter in chunk.named_parameters():
            if _is_repeated(name, hf_model):
                continue
            _, size = _shard_position(chunk, name)
            for global_name, shards in _gather(chunk, name, parameter.detach()):
                specs = [mapping.shard(global_name, rank, size) for rank in range(size)]
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
        dtype: of the written weights; None: that of the parameters.
        max_shard_bytes: largest file, unless one tensor is larger.

    Raises:
        ValueError: on every rank, with the file: an output folder that holds something, no
            permission, a full disk, a model that is not the source's. Nothing is left behind.
        NotImplementedError: on every rank: an unsupported architecture or setting of the source,
            or experts in the layout of the legacy grouped GEMM. Nothing is left behind.
    """
    out, source = Path(out_dir), Path(source_hf_dir)
    chunks = [_unwrap(model) for model in models]

    def prepare() -> HfModel:
        hf_model = read_hf_config(source)
        for chunk in chunks:
            _check_built_for(chunk, hf_model, source)
        if dist.get_rank() == 0:
            start_folder(out)
        return hf_model

    hf_model = _together(prepare)
    stored = dtype or next(chunks[0].parameters()).dtype
    writers = _writers(chunks, hf_model)
    plan = make_file_plan(Mapping(hf_model).hf_shapes(), stored, max_shard_bytes, writers)
    writer = HfWriter(partial_path(out), plan, stored)
    failure: Exception | None = None

    def complete() -> None:
        if failure is not None:
            raise failure
        writer.finish()

    def publish() -> None:
        if dist.get_rank() == 0:
            write_hf_metadata(partial_path(out), plan, hf_model, stored, source)
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


def _writers(chunks: Sequence[Any], hf_model: HfModel) -> dict[str, int]:
    """Tensor name -> the rank that writes it: the lowest that holds a part of it."""
    names: set[str] = set()
    for chunk in chunks:
        mapping = Mapping(hf_model, chunk.vocab_size)
        for name, _ in chunk.named_parameters():
            if not _is_repeated(name, hf_model):
                for global_name in _gathered_names(chunk, name):
                    names |= {piece.name for piece in mapping.shard(global_name).pieces}
    everyone: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return {name: rank for rank in reversed(range(len(everyone))) for name in everyone[rank]}


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


def _unwrap(model: Any) -> Any:
    while not hasattr(model, "decoder") and hasattr(model, "module"):
        model = model.module
    return model


def _is_repeated(name: str, hf_model: HfModel) -> bool:
    return hf_model.tied and name == "output_layer.weight"


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def _shard_position(chunk: Any, name: str) -> tuple[int, int]:
    """Rank and size of the group over which a parameter is cut."""
    groups = chunk.pg_collection
    group = groups.expt_tp if _is_expert(name) else groups.tp
    return group.rank(), group.size()


def _global_name(chunk: Any, name: str) -> str:
    """Local-spec name with the layer and the expert numbered over the whole model."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not match:
        return name
    layer = chunk.decoder.layers[int(match[1])]
    leaf = FUSED_NORMS.get(match[2], match[2])
    if leaf in ("mlp.experts.weight1", "mlp.experts.weight2"):
        raise NotImplementedError(
            f"{name}: the legacy grouped GEMM layout of experts is not supported; set "
            "moe_grouped_gemm=False or use Transformer Engine's grouped layers"
        )
    leaf = re.sub(
        r"^mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$",
        r"mlp.experts.local_experts.\3.\1.\2",
        leaf,
    )
    expert = re.fullmatch(r"(mlp\.experts\.local_experts\.)(\d+)(\..+)", leaf)
    if expert:
        number = int(expert[2]) + chunk.pg_collection.ep.rank() * layer.mlp.num_local_experts
        leaf = f"{expert[1]}{number}{expert[3]}"
    return f"decoder.layers.{layer.layer_number - 1}.{leaf}"


def _gathered_names(chunk: Any, name: str) -> list[str]:
    """Global names of what the expert-parallel ranks hold under one local name."""
    own = _global_name(chunk, name)
    if not _is_expert(name):
        return [own]
    layer = int(own.split(".")[2])
    local = next(x for x in chunk.decoder.layers if x.layer_number - 1 == layer)
    count, groups = local.mlp.num_local_experts, chunk.pg_collection
    head, number, tail = re.fullmatch(r"(.+local_experts\.)(\d+)(\..+)", own).groups()  # type: ignore[union-attr]
    first = int(number) - groups.ep.rank() * count
    return [f"{head}{first + rank * count}{tail}" for rank in range(groups.ep.size())]


def _gather(chunk: Any, name: str, shard: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """Global name and all tensor-parallel shards; one pair per expert-parallel rank."""
    groups = chunk.pg_collection
    shards = _all_gather(shard, groups.expt_tp if _is_expert(name) else groups.tp)
    names = _gathered_names(chunk, name)
    if len(names) == 1:
        yield names[0], shards
        return
    for global_name, stacked in zip(names, _all_gather(torch.stack(shards), groups.ep)):
        yield global_name, list(stacked)


def _all_gather(tensor: Tensor, group: Any) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered


def _check_built_for(chunk: Any, hf_model: HfModel, path: Path) -> None:
    """The model must be the folder's: shapes alone would not show another rope base."""
    want = {k: v for k, v in hf_model.transformer_config().items() if not k.endswith("dropout")}
    # How experts are run and balanced is the caller's choice.
    for key in ("moe_router_load_balancing_type", "moe_token_dispatcher_type", "moe_grouped_gemm"):
        want.pop(key, None)
    pairs = {key: (getattr(chunk.config, key, None), value) for key, value in want.items()}
    pairs["rotary_base"] = (chunk.rotary_base, hf_model.rotary_base)
    pairs["rope_scaling"] = (bool(chunk.rotary_scaling), hf_model.rope_type == "llama3")
    linear = hf_model.rope_factor if hf_model.rope_type == "linear" else None
    interpolation = chunk.rotary_pos_emb.seq_len_interpolation_factor
    pairs["seq_len_interpolation_factor"] = (interpolation, linear)
    shared = chunk.share_embeddings_and_output_weights
    pairs["share_embeddings_and_output_weights"] = (shared, hf_model.tied)
    wrong = [f"{key}={got!r} must be {need!r}" for key, (got, need) in pairs.items() if got != need]
    if chunk.vocab_size < hf_model.vocab_size:
        wrong.append(f"vocab_size={chunk.vocab_size} must be at least {hf_model.vocab_size}")
    if wrong:
        raise ValueError(
            f"{path}: the model was built for another configuration: "
            + "; ".join(wrong)
            + ". Build it from read_hf_config()"
        )
    # A parameter without a counterpart is refused before anything is written.
    for name, _ in chunk.named_parameters():
        _global_name(chunk, name)
