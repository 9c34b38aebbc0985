"""Conversion between Hugging Face folders and Megatron checkpoints, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..parallel import ParallelSizes, PipelineSplit
from .arguments import make_megatron_args
from .folders import (
    MAX_SHARD_BYTES,
    HfFolder,
    HfWriter,
    MegatronFolder,
    TorchDistWriter,
    WeightSource,
    common_state,
    has_tokenizer,
    is_hf_folder,
    iteration_name,
    make_weight_files,
    write_hf_metadata,
    write_hf_metadata_folder,
    write_tracker,
    written_places,
)
from .new_folder import atomic_folder, check_absent
from .table import make_shard

_LINEAR = re.compile(r"(.+\.(?:linear_\w+|in_proj|out_proj))\.weight(?:\.query|\.z)?")
# Called with (done, total) after every tensor.
Progress = Callable[[int, int], None]


def hf_to_megatron(
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    vpp_size: int | None = None,
    ep_size: int = 1,
    etp_size: int | None = None,
    split: PipelineSplit | None = None,
    dtype: torch.dtype | None = None,
    make_vocab_size_divisible_by: int = 128,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a Hugging Face folder as a torch_dist checkpoint that Megatron-LM's ``--load`` takes.

    The tensors are layout-free: any sizes load them. The layout given is checked
    against the model, decides the padding of the vocabulary and is recorded in ``args``.

    Args:
        hf_dir: folder with ``config.json`` and safetensors.
        out_dir: gets ``release/``, the tracker file and ``huggingface/`` (configuration and
            tokenizer, for the way back).
        tp_size: tensor-parallel size to record.
        pp_size: pipeline-parallel size to record.
        vpp_size: chunks per pipeline rank to record.
        ep_size: expert-parallel size to record.
        etp_size: expert-tensor-parallel size to record; None: ``tp_size``.
        split: how stages come by their layers, to record; None: evenly.
        dtype: of the written weights; None: every tensor as stored.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times tp.
        dry_run: check everything, write nothing.
        progress: called after every parameter.

    Returns:
        The iteration folder.

    Raises:
        ValueError: naming the file: a damaged or mismatching folder, an output that exists.
        NotImplementedError: an unsupported architecture or setting.
    """
    source, out = HfFolder(hf_dir), Path(out_dir)
    args = make_megatron_args(
        source.model,
        ParallelSizes(tp=tp_size, pp=pp_size, vpp=vpp_size, ep=ep_size, etp=etp_size),
        split or PipelineSplit(),
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        dtype=dtype,
    )
    check_dtypes(source, args.padded_vocab_size, dtype)
    check_absent(out)
    target = out / iteration_name(None)
    if dry_run:
        return target
    with atomic_folder(out) as partial:
        folder = partial / iteration_name(None)
        folder.mkdir()
        writer = TorchDistWriter(folder)
        write_megatron_weights(writer, source, args.padded_vocab_size, dtype, progress)
        writer.finish(common_state(args, None))
        write_hf_metadata_folder(partial, source.path, dtype)
        write_tracker(partial, None)
    return target


def check_dtypes(source: WeightSource, padded_vocab_size: int, dtype: torch.dtype | None) -> None:
    """Hugging Face tensors that Megatron keeps in one must have one dtype, unless it is given.

    Raises:
        ValueError: naming two that differ.
    """
    if dtype is not None:
        return
    table = source.model.weight_table(padded_vocab_size)
    first: dict[str, str] = {}
    for name in table.megatron_names():
        if table.dtype(name) is not None:
            continue
        for piece in table.shard(name).pieces:
            key = written_places(name, source.model)[0].key
            together = first.setdefault(key, piece.name)
            if source.dtypes[piece.name] != source.dtypes[together]:
                raise ValueError(
                    f"{source.path}: {together} is {source.dtypes[together]}, {piece.name} "
                    f"{source.dtypes[piece.name]}; Megatron stores them as one tensor: pass "
                    "dtype=DTYPE"
                )


def write_megatron_weights(
    writer: TorchDistWriter,
    source: WeightSource,
    padded_vocab_size: int,
    dtype: torch.dtype | None,
    progress: Progress | None = None,
) -> None:
    """Write every parameter (and the empty extra state of every linear layer) of a source.

    Dtypes that differ within a tensor of the checkpoint are refused by ``check_dtypes``.
    """
    table = source.model.weight_table(padded_vocab_size)
    names = table.megatron_names()
    for done, name in enumerate(names, 1):
        shard = table.shard(name)
        stored = table.dtype(name) or dtype or source.dtypes[shard.pieces[0].name]
        tensor = make_shard(shard, source.read, stored, name)
        parts = table.sections(name, tensor)
        for part, place in ((t, p) for n, t in parts for p in written_places(n, source.model)):
            shape = *place.leading, *part.shape
            writer.add(place.key, part, shape, (*place.index, *(0 for _ in part.shape)))
            # The first part of one that is stored in parts stands for its layer.
            linear = _LINEAR.fullmatch(place.key)
            if linear:
                # A layer's own tensors are the only part of their object.
                at = ".".join(map(str, place.index or (0,)))
                of = ".".join(map(str, place.leading or (1,)))
                writer.add_object(f"{linear[1]}._extra_state/shard_{at}_{of}", [None])
        if progress:
            progress(done, len(names))
    if source.model.is_hybrid:
        # GPTModel leaves out that of its output layer, which HybridModel asks for.
        writer.add_object("output_layer._extra_state/shard_0_1", [None])


def megatron_to_hf(
    megatron_dir: str | Path,
    out_dir: str | Path,
    *,
    hf_config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_pickle: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Write a Megatron checkpoint of any layout as a folder that ``transformers`` loads.

    Args:
        megatron_dir: folder with the tracker file, or one iteration's folder; torch_dist or
            legacy.
        out_dir: gets sharded safetensors with an index, ``config.json``, tokenizer and
            generation config.
        hf_config: folder with the configuration and tokenizer; None: the checkpoint's
            ``huggingface/``, or a configuration made from its ``args`` (without tokenizer).
        dtype: of the written weights; None: every tensor as stored.
        max_shard_bytes: largest file, unless one tensor is larger.
        trust_pickle: allow unpickling (legacy checkpoints).
        dry_run: check everything, write nothing.
        progress: called after every tensor.

    Returns:
        Whether a tokenizer was found to go along.

    Raises:
        ValueError: naming the file: a damaged or mismatching checkpoint, an output that exists.
        NotImplementedError: a model that no supported architecture describes.
    """
    out = Path(out_dir)
    source = MegatronFolder(megatron_dir, hf_config=hf_config, trust_pickle=trust_pickle)
    check_absent(out)
    if not dry_run:
        write_hf(source, out, source.hf_config, dtype, max_shard_bytes, progress)
    return source.hf_config is not None and has_tokenizer(source.hf_config)


def write_hf(
    source: WeightSource,
    out: Path,
    hf_config: Path | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write any source as a Hugging Face folder, atomically."""
    carried = source.carried
    dtypes = source.model.weight_table().hf_dtypes(dtype) if dtype else source.dtypes
    dtypes, shapes = dtypes | carried.dtypes, source.shapes | carried.shapes
    files = make_weight_files(shapes, dtypes, max_shard_bytes)
    with atomic_folder(out) as partial:
        writer = HfWriter(partial, files, dtypes)
        for done, name in enumerate(shapes, 1):
            read = carried.read if name in carried.shapes else source.read
            writer.add(name, read(name))
            if progress:
                progress(done, len(shapes))
        writer.finish()
        model = replace(source.model, dtype=dtype) if dtype else source.model
        write_hf_metadata(partial, files, model, hf_config)


def open_weights(
    path: str | Path, *, hf_config: str | Path | None = None, trust_pickle: bool = False
) -> WeightSource:
    """A Hugging Face folder or a Megatron checkpoint, whichever ``path`` is.

    Raises:
        ValueError: if it is neither, or damaged, or needs ``trust_pickle``.
        NotImplementedError: an unsupported architecture or setting, or a legacy expert-parallel
            checkpoint.
    """
    path = Path(path)
    if is_hf_folder(path):
        return HfFolder(path)
    return MegatronFolder(path, hf_config=hf_config, trust_pickle=trust_pickle)
