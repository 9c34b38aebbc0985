"""A distributed optimizer's state without a gather: each rank saves and loads what it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]


@contextmanager
def with_own_shards(optimizer: Any) -> Iterator[None]:
    """Let a distributed optimizer save and load ``fully_reshardable`` states by parts in the block.

    Files hold what Megatron-Core's own saves do, tensors in the shape of the model's parameters
    under the same names, which every parallel layout loads. Megatron gathers them on the first
    data-parallel rank, 12 bytes for each parameter of its tensor- and pipeline-parallel share,
    while all others wait, and loads as much on every rank. Here each rank describes the run of
    elements that it holds by the boxes that they fill, and nothing is exchanged.

    Args:
        optimizer: Megatron's, as from ``get_megatron_optimizer``; any other kind passes unchanged.
    """
    with ExitStack() as stack:
        for part in optimizer.chained_optimizers:
            if isinstance(part, DistributedOptimizer):
                for name, method in (
                    ("sharded_param_state_fully_reshardable", partial(_shards, part)),
                    ("load_parameter_state_from_fully_reshardable", partial(_take, part)),
                ):
                    stack.enter_context(mock.patch.object(part, name, method))
        yield


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Boxes (offsets, sizes) that hold elements ``start`` to ``stop`` of a row-major tensor.

    In the elements' order, and as few as rows allow:

        boxes_of_run((4, 3), 2, 11) -> ((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 2))
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if row > 1 and first == last and stop - start < row:
        for offsets, sizes in boxes_of_run(shape[1:], start - first * row, stop - first * row):
            yield (first, *offsets), (1, *sizes)
        return
    # Whole rows, and what of the rows before and behind them is left.
    low, high = -(-start // row), stop // row
    yield from boxes_of_run(shape, start, min(low * row, stop))
    if low < high:
        yield (low, *(0 for _ in shape[1:])), (high - low, *shape[1:])
    yield from boxes_of_run(shape, max(high * row, start), stop)


def _shards(
    optimizer: Any,
    model_state: Mapping[str, Any],
    is_loading: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """In place of ``sharded_param_state_fully_reshardable``, by number of the parameter."""
    described, _ = extract_sharded_tensors_and_factories(dict(model_state))
    of_parameter = {part.data: part for part in nested_values(described)}
    state = {}
    for number, (parameter, start) in enumerate(_own_runs(optimizer)):
        places = _places(of_parameter[parameter])
        state[number] = {
            name: [
                shard
                for place in places
                for shard in _cut(
                    place,
                    f"optimizer.state.{name}.{place.key}",
                    torch.empty(values.shape, dtype=values.dtype) if is_loading else values,
                    start,
                    optimizer.distributed_optimizer_instance_id,
                )
            ]
            for name, values in optimizer._get_main_param_and_optimizer_states(parameter).items()
            # Of all parameters the same, and among the settings.
            if name != "step"
        }
    return state


@torch.no_grad()
def _take(optimizer: Any, state: Mapping[int, Mapping[str, Sequence[Tensor]]]) -> None:
    """In place of ``load_parameter_state_from_fully_reshardable``."""
    for number, (parameter, _) in enumerate(_own_runs(optimizer)):
        tensors = {
            name: torch.cat([box.flatten() for box in boxes])
            for name, boxes in state[number].items()
        }
        optimizer._set_main_param_and_optimizer_states(parameter, tensors)


def _own_runs(optimizer: Any) -> Iterator[tuple[Any, int]]:
    """Parameters of which this rank holds elements, and the first of these."""
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start


def _places(described: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Where a parameter lies in whole tensors: its parts, with meta tensors that say which.

    Raises:
        NotImplementedError: on a part that is no run of the parameter's elements.
    """
    template = replace(described, data=torch.empty_like(described.data, device="meta"))
    if isinstance(template, ShardedTensor):
        return [template]
    parts = list(nested_values({0: template.build()}))
    for part in parts:
        if not part.data.is_contiguous():
            raise NotImplementedError(
                f"{part.key} is stored in another order than in memory, and a distributed "
                "optimizer holds runs of it; set parallel.use_distributed_optimizer=false"
            )
    return parts


def _cut(
    place: ShardedTensor, key: str, values: Tensor, start: int, replica: int
) -> Iterator[ShardedTensor]:
    """What of a place the run of a parameter's elements from ``start`` holds, box by box."""
    assert place.data is not None
    begin = place.data.storage_offset()
    low = max(start, begin)
    high = min(start + values.numel(), begin + place.data.numel())
    done = low - start
    # Axes of the whole tensor that the parameter has not: layers, experts.
    lead = place.prepend_axis_num
    for offsets, sizes in boxes_of_run(place.local_shape, low - begin, high - begin):
        count, shape = math.prod(sizes), (1,) * lead + sizes
        shifts = (0,) * lead + offsets
        yield replace(
            place,
            key=key,
            data=values.detach()[done : done + count].view(shape),
            dtype=values.dtype,
            local_shape=shape,
            prepend_axis_num=0,
            global_offset=tuple(a + b for a, b in zip(place.global_offset, shifts, strict=True)),
            # Boxes are of many sizes.
            axis_fragmentations=None,
            replica_id=(*place.replica_id[:2], replica),
        )
        done += count
