"""A Megatron checkpoint rewritten for another layout, optimizer state included."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parallel import ParallelSizes, PipelineSplit
from .arguments import LAYOUT_ARGUMENTS, check_layout, make_megatron_args
from .convert import Progress, write_megatron_weights
from .folders import (
    COMMON_STATE,
    Chunk,
    MegatronFolder,
    StoredTensor,
    TorchDistReader,
    TorchDistWriter,
    is_optimizer_state,
    is_per_rank,
    is_torch_dist,
    iteration_name,
    write_hf_metadata_folder,
    write_tracker,
)
from .new_folder import atomic_folder, check_absent
from .table import EMBEDDING, HEAD, check_finite

_NOT_RESHARDABLE = "optimizer.distributed.dp_group_idx"
# A damaged number would fill memory with rows of padding.
_MAX_DIVISOR = 1 << 16


def reshard_checkpoint(
    megatron_dir: str | Path,
    out_dir: str | Path,
    *,
    tp_size: int,
    pp_size: int,
    vpp_size: int | None = None,
    ep_size: int = 1,
    etp_size: int | None = None,
    split: PipelineSplit | None = None,
    weights_only: bool = False,
    hf_config: str | Path | None = None,
    trust_pickle: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the same training state for another parallel layout.

    Equals the source value for value. Tensors of torch_dist are the whole model's, so they are
    copied part by part; the vocabulary is padded for ``tp_size``, ``args`` name the new layout,
    and the ranks' random states are left out. JSON files beside the tensors (a training loop's
    progress) go along, so that a run continues from either. A legacy checkpoint becomes
    torch_dist (weights).

    Args:
        megatron_dir: folder with the tracker file, or one iteration's folder.
        out_dir: gets the iteration, the tracker file and ``huggingface/``.
        tp_size: new tensor-parallel size.
        pp_size: new pipeline-parallel size.
        vpp_size: new number of chunks per pipeline rank.
        ep_size: new expert-parallel size.
        etp_size: new expert-tensor-parallel size; None: ``tp_size``.
        split: how the new stages come by their layers; None: evenly.
        weights_only: leave the optimizer out.
        hf_config: folder with the model's configuration; None: as in ``MegatronFolder``.
        trust_pickle: allow unpickling (legacy checkpoints).
        dry_run: check everything, write nothing.
        progress: called after every tensor.

    Returns:
        The new iteration folder.

    Raises:
        ValueError: naming the file: a damaged checkpoint, a layout that does not fit, or an
            optimizer state that only its own layout can load.
        NotImplementedError: a model that no supported architecture describes, or a legacy
            expert-parallel checkpoint.
    """
    source = MegatronFolder(megatron_dir, hf_config=hf_config, trust_pickle=trust_pickle)
    out, iteration = Path(out_dir), _iteration(source)
    name = iteration_name(iteration)
    sizes = ParallelSizes(tp=tp_size, pp=pp_size, vpp=vpp_size, ep=ep_size, etp=etp_size)
    split = split or PipelineSplit()
    check_layout(source.model, sizes, split)
    args = _args(source, sizes, split)
    reader = TorchDistReader(source.path) if is_torch_dist(source.path) else None
    if reader is None and not weights_only:
        raise ValueError(
            f"{source.path}: the optimizer state of a legacy checkpoint is not resharded; pass "
            "weights_only=True, or save as torch_dist"
        )
    kept = _kept(reader, weights_only) if reader else {}
    if source.model.num_experts:
        _check_parts(source.path, kept, sizes.ep)
    check_absent(out)
    if dry_run:
        return out / name
    with atomic_folder(out) as partial:
        folder = partial / name
        folder.mkdir()
        writer = TorchDistWriter(folder)
        common: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": iteration or 0}
        if reader is None:
            write_megatron_weights(writer, source, args.padded_vocab_size, None, progress)
        else:
            _copy(reader, kept, writer, args.padded_vocab_size, progress)
            _copy_objects(reader, writer, weights_only)
            if not weights_only:
                _copy_records(reader, folder)
            common = reader.read_common(trust_pickle=trust_pickle)
        if weights_only:
            common = {k: v for k, v in common.items() if not k.startswith(("optimizer", "opt_"))}
        writer.finish(common | {"args": args})
        if source.hf_config is not None:
            write_hf_metadata_folder(partial, source.hf_config)
        write_tracker(partial, iteration)
    return out / name


def _iteration(source: MegatronFolder) -> int | None:
    """The number in the folder's name; None for a release and for any other name."""
    digits = source.path.name.removeprefix("iter_")
    return int(digits) if digits.isdecimal() and digits.isascii() else None


def _args(source: MegatronFolder, sizes: ParallelSizes, split: PipelineSplit) -> Namespace:
    """The source's arguments with the new layout; made anew where it has none."""
    divisible_by = getattr(source.args, "make_vocab_size_divisible_by", None)
    divisible_by = 128 if divisible_by is None else divisible_by
    if type(divisible_by) is not int or not 1 <= divisible_by <= _MAX_DIVISOR:
        raise ValueError(
            f"{source.path}: args have make_vocab_size_divisible_by={str(divisible_by)[:80]!r}, "
            f"which must be an integer from 1 to {_MAX_DIVISOR}; restore the checkpoint"
        )
    fresh = make_megatron_args(
        source.model,
        sizes,
        split,
        make_vocab_size_divisible_by=divisible_by,
        dtype=source.dtypes[source.model.embedding],
    )
    if source.args is None:
        return fresh
    args = copy.copy(source.args)
    for key in (*LAYOUT_ARGUMENTS, "padded_vocab_size", "no_save_rng", "ckpt_format"):
        setattr(args, key, getattr(fresh, key))
    # Megatron-LM compares it before it loads what belongs to ranks.
    args.world_size = 0
    return args


def _kept(reader: TorchDistReader, weights_only: bool) -> dict[str, StoredTensor]:
    """Tensors that go along.

    Raises:
        ValueError: naming the folder, if the optimizer state fits only the old layout.
    """
    tensors = {k: v for k, v in reader.tensors.items() if not is_per_rank(k)}
    if weights_only:
        return {k: v for k, v in tensors.items() if not is_optimizer_state(k)}
    bound = [key for key in tensors if _NOT_RESHARDABLE in key]
    if bound:
        raise ValueError(
            f"{reader.folder}: the optimizer state ({bound[0]}) is laid out by data-parallel rank "
            "and only loads at its own tp and pp; save it with "
            "distrib_optim_sharding_type='fully_reshardable' (Megatron-LM's "
            "--dist-ckpt-optim-fully-reshardable), or pass weights_only=True"
        )
    return tensors


def _check_parts(path: Path, names: Iterable[str], ep_size: int) -> None:
    """Refuse an optimizer state that the new layout would have in other parts.

    Raises:
        ValueError: naming the folder and what to set.
    """
    states = [name for name in names if is_optimizer_state(name)]
    is_parted = any(name.startswith("chained_") for name in states)
    if states and is_parted != (ep_size > 1):
        raise ValueError(
            f"{path}: the optimizer's state of experts lies "
            f"{'apart from' if is_parted else 'together with'} that of other weights, and at "
            f"expert_model_parallel_size={ep_size} Megatron-Core has them "
            f"{'together' if is_parted else 'apart'}; pass "
            f"expert_model_parallel_size={'2 or more' if is_parted else 1}, or weights_only=True"
        )


def _copy(
    reader: TorchDistReader,
    tensors: dict[str, StoredTensor],
    writer: TorchDistWriter,
    padded_vocab_size: int,
    progress: Progress | None,
) -> None:
    for done, (key, tensor) in enumerate(tensors.items(), 1):
        if is_vocabulary(key):
            whole = reader.read(key)
            _check_finite(reader, key, tensor.chunks[0], whole)
            whole = _padded(whole, padded_vocab_size)
            writer.add(key, whole, tuple(whole.shape), (0,) * whole.dim())
        else:
            for chunk in tensor.chunks:
                part = reader.read_chunk(key, chunk)
                _check_finite(reader, key, chunk, part)
                writer.add(key, part, tensor.shape, chunk.offsets)
        if progress:
            progress(done, len(tensors))


def _check_finite(reader: TorchDistReader, key: str, chunk: Chunk, part: Tensor) -> None:
    """Weights are refused as everywhere; what an optimizer holds is its own business."""
    if not is_optimizer_state(key):
        check_finite(part, f"{reader.folder / chunk.file}: tensor {key}")


def _copy_objects(reader: TorchDistReader, writer: TorchDistWriter, weights_only: bool) -> None:
    for key in reader.objects:
        if key == COMMON_STATE or is_per_rank(key):
            continue
        if not (weights_only and is_optimizer_state(key)):
            writer.add_bytes(key, reader.read_bytes(key))


def _copy_records(reader: TorchDistReader, folder: Path) -> None:
    """What a training loop keeps beside the tensors, its progress, goes along."""
    for name in reader.files.names:
        if name.endswith(".json") and name != "metadata.json":
            (folder / name).write_bytes(reader.files.read(name))


def is_vocabulary(key: str) -> bool:
    """Whether a tensor (or an optimizer's copy of it) has one row per token of the vocabulary."""
    return key.endswith((EMBEDDING, HEAD))


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """As many rows as asked for; training may have moved padding rows, so they are kept."""
    padded = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype)
    kept = min(rows, len(tensor))
    padded[:kept] = tensor[:kept]
    return padded
