"""One rank of a job whose other ranks are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

T = TypeVar("T")


@contextmanager
def alone(rank: int, num_ranks: int) -> Iterator[None]:
    """Process groups that are made within send nothing, and what arrives has no values."""
    initialize, new_group = dist.init_process_group, dist.new_group
    place: dict[str, Any] = dict(rank=rank, world_size=num_ranks)

    def gather_objects(objects: list[Any], own: Any, group: Any = None) -> None:
        """As if all ranks gave the same."""
        objects[:] = [own] * len(objects)

    def gather_on_one(obj: Any, object_gather_list: list[Any] | None = None, **others: Any) -> None:
        if object_gather_list is not None:
            gather_objects(object_gather_list, obj)

    def scatter_objects(
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any] | None = None,
        **others: Any,
    ) -> None:
        """To the rank that has them."""
        assert scatter_object_input_list is not None
        scatter_object_output_list[:] = scatter_object_input_list[:1]

    with (
        mock.patch.dict("os.environ", MASTER_ADDR="nowhere"),
        mock.patch.multiple(
            dist,
            init_process_group=lambda **_: initialize("fake", store=FakeStore(), **place),
            new_group=lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"}),
            all_gather_object=gather_objects,
            gather_object=gather_on_one,
            scatter_object_list=scatter_objects,
            broadcast_object_list=lambda *_, **__: None,
        ),
    ):
        yield


class NoReplicas:
    """``grpo.Replicas`` of a rank that decides by itself."""

    rank, size, num_ranks, leads = 0, 1, 1, True

    def gather(self, action: Callable[[], T]) -> list[T]:
        return [action()]

    def exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        return list(parts)

    def share(self, action: Callable[[], T]) -> T:
        return action()

    def from_last_stage(self, values: Tensor | None, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64) if values is None else values
