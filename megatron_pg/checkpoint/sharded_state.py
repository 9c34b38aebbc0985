"""Megatron-Core's sharded state dicts filled from a checkpoint that nobody has to trust."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)

from ..parallel import on_all_ranks
from .folders import COMMON_STATE, TorchDistReader, is_extra_state

# An optimizer of several, as ``ChainedOptimizer`` names their states.
_PART = re.compile(r"(chained_\d+\.)+")


def load_sharded_state(sharded_state: dict[str, Any], reader: TorchDistReader) -> dict[str, Any]:
    """The state of a checkpoint for this rank; tensors are loaded in place.

    Equals ``megatron.core.dist_checkpointing.load``, which unpickles what it reads, bit for bit.
    Everything that the checkpoint holds must be asked for by some rank and the other way round, in
    its shape and dtype. Extra states of layers must be empty and are left as they are. Every rank
    takes part, and an error of one is raised on all of them.

    Args:
        sharded_state: as ``sharded_state_dict`` of model and optimizer give it.
        reader: of the checkpoint.

    Raises:
        ValueError: naming the file or the tensors: damaged, left over, missing or of another shape.
    """
    sharded, local, factories = load_preprocess(sharded_state)
    sharded, _ = extract_sharded_base(sharded)
    asked, asked_by_all = determine_global_metadata(sharded)
    validate_sharding_integrity(asked_by_all)

    def read() -> dict[str, Any]:
        _check_names({_name(part) for parts in asked_by_all for part in parts}, reader)
        for part in asked:
            _check_part(part, reader)
        extra = sorted(key for key in reader.objects if is_extra_state(key))
        for key in extra[dist.get_rank() :: dist.get_world_size()]:
            reader.read_object(key)
        dict_list_map_inplace(lambda part: _read(part, reader), sharded)
        return reader.read_common()

    state = on_all_ranks(read)
    merge(state, local)
    merge(state, sharded)
    loaded: dict[str, Any] = apply_factory_merges(state, factories)
    return loaded


def _name(part: ShardedTensor | ShardedObject) -> str:
    return str(part.unique_key if isinstance(part, ShardedObject) else part.key)


def _check_names(asked: set[str], reader: TorchDistReader) -> None:
    stored = {*reader.tensors, *reader.objects} - {COMMON_STATE}
    if _without_parts(stored - asked) == _without_parts(asked - stored) != set():
        is_parted = any(_PART.match(name) for name in stored)
        raise ValueError(
            f"{reader.folder} holds the optimizer's state of experts "
            f"{'apart from' if is_parted else 'together with'} that of other weights, this run has "
            f"them {'together' if is_parted else 'apart'}: Megatron-Core parts them where "
            "expert_model_parallel_size divides the experts, and does not convert the state; keep "
            "dividing them, or not, as the run that saved it"
        )
    problems = []
    for what, names in (
        ("holds what this run has no place for", stored - asked),
        ("does not hold", asked - stored),
    ):
        # What kind of layer computes decides which of them have one.
        named = sorted(name for name in names if not is_extra_state(name))
        if named:
            more = f" and {len(named) - 8} more" if len(named) > 8 else ""
            problems.append(f"{what}: {', '.join(named[:8])}{more}")
    if problems:
        raise ValueError(
            f"{reader.folder} {'; it '.join(problems)}. It is of another model or optimizer: go on "
            "with the model and optimizer settings that saved it"
        )


def _without_parts(names: set[str]) -> set[str]:
    return {_PART.sub("", name) for name in names if not is_extra_state(name)}


def _check_part(part: ShardedTensor | ShardedObject, reader: TorchDistReader) -> None:
    if isinstance(part, ShardedObject):
        if part.unique_key in reader.tensors:
            raise ValueError(f"{reader.folder}: {part.unique_key} is a tensor, must be an object")
        return
    if part.key not in reader.tensors:
        raise ValueError(f"{reader.folder}: {part.key} is an object, must be a tensor")
    stored, shape = reader.tensors[part.key], tuple(part.global_shape)
    fits = stored.shape == shape or (part.allow_shape_mismatch and len(stored.shape) == len(shape))
    if not fits or stored.dtype != part.dtype or part.flattened_range is not None:
        raise ValueError(
            f"{reader.folder}: {part.key} is {list(stored.shape)} of {stored.dtype}, this run has "
            f"{list(shape)} of {part.dtype}; go on with the model settings that saved it"
        )


def _read(part: ShardedTensor | ShardedObject, reader: TorchDistReader) -> Any:
    if isinstance(part, ShardedObject):
        return part.data if is_extra_state(part.unique_key) else reader.read_object(part.unique_key)
    if part.data is None:
        part.init_data("cpu")
    sizes = (*(1 for _ in range(part.prepend_axis_num)), *part.local_shape)
    box = reader.read_box(part.key, tuple(part.global_offset), sizes)
    loaded: torch.Tensor = part.data.detach()
    loaded.copy_(box.reshape(loaded.shape))
    return loaded
