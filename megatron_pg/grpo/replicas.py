"""This rank's place among the replicas of the model, and what replicas tell each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ..parallel import attempt, from_all_ranks, told_error

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank's place in the parallel layout.

    Attributes:
        device: where its part of the model lives.
        rank, world_size: of the whole job.
        dp_rank, dp_size: of the data-parallel replicas.
        is_last_stage: whether this rank predicts tokens.
        tp_rank: place among the tensor-parallel ranks.
        leads_replica: whether it is the first rank of its replica, which brings the groups.
        cp_rank: place among the context-parallel ranks.
    """

    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    is_last_stage: bool
    tp_rank: int
    leads_replica: bool
    cp_rank: int = 0

    @classmethod
    def from_megatron(cls) -> Ranks:
        """As ``parallel_state`` has it, which must be initialized."""
        has_cuda = torch.cuda.is_available()
        cp_rank = parallel_state.get_context_parallel_rank()
        is_first = dist.get_rank(parallel_state.get_model_parallel_group()) == 0
        return cls(
            device=torch.device("cuda", torch.cuda.current_device())
            if has_cuda
            else torch.device("cpu"),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            # Megatron's model-parallel group is of one context-parallel rank.
            leads_replica=is_first and cp_rank == 0,
            cp_rank=cp_rank,
        )

    @property
    def speaks_for_replica(self) -> bool:
        """One rank of each replica: it holds the logprobs and counts the metrics."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0


class Replicas(Protocol):
    """What the data-parallel replicas tell each other; every call is a collective."""

    rank: int
    size: int
    num_ranks: int
    """Ranks of one replica."""
    leads: bool
    """Whether this is the first of them, whose groups count."""

    def gather(self, action: Callable[[], T]) -> list[T]:
        """What ``action`` returned on every replica, on each; an error is raised on all of them."""
        ...

    def exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        """Part i goes to replica i; what every replica sent to this one."""
        ...

    def share(self, action: Callable[[], T]) -> T:
        """What ``action`` returned on the first rank of this replica, on all of its ranks.

        An error is raised on all of them.
        """
        ...

    def from_last_stage(self, values: Tensor | None, count: int) -> Tensor:
        """``[count]`` float64 of the last pipeline stage, on all stages of this replica."""
        ...


class MegatronReplicas:
    """The replicas of ``parallel_state``, which must be initialized; see ``Replicas``.

    Raises:
        ValueError: on CUDA, if Megatron's gloo groups were left out: messages are made on the host.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.size = ranks.dp_rank, ranks.dp_size
        self.leads = ranks.leads_replica
        self.device = ranks.device
        self._replicas = _host_group()
        self._replica = parallel_state.get_model_parallel_group()
        self._context = parallel_state.get_context_parallel_group()
        self.num_ranks = dist.get_world_size(self._replica) * dist.get_world_size(self._context)
        self._stages = parallel_state.get_pipeline_model_parallel_group()

    def gather(self, action: Callable[[], T]) -> list[T]:
        """See ``Replicas.gather``."""
        if self.size == 1:
            return [action()]
        return from_all_ranks(action, self._replicas)

    def exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        """See ``Replicas.exchange``."""
        if self.size == 1:
            return list(parts)
        sent = torch.tensor([len(part) for part in parts])
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._replicas)
        content = torch.frombuffer(bytearray(b"".join(parts)) or bytearray(1), dtype=torch.uint8)
        arrived = torch.empty(int(received.sum()), dtype=torch.uint8)
        dist.all_to_all_single(
            arrived,
            content[: int(sent.sum())],
            received.tolist(),
            sent.tolist(),
            group=self._replicas,
        )
        return [part.numpy().tobytes() for part in torch.split(arrived, received.tolist())]

    def share(self, action: Callable[[], T]) -> T:
        """See ``Replicas.share``."""
        if self.num_ranks == 1:
            return action()
        value, error = attempt(action) if self.leads else (None, None)
        shared: list[Any] = [value, told_error(error)]
        # To the first rank of every other context-parallel part, and within each part.
        for group in (self._context, self._replica):
            if dist.get_world_size(group) > 1:
                source = dist.get_global_rank(group, 0)
                dist.broadcast_object_list(shared, src=source, group=group, device=self.device)
        if shared[1] is not None:
            raise error or shared[1]
        return shared[0]  # type: ignore[no-any-return]

    def from_last_stage(self, values: Tensor | None, count: int) -> Tensor:
        """See ``Replicas.from_last_stage``."""
        num_stages = dist.get_world_size(self._stages)
        if num_stages == 1:
            assert values is not None
            return values
        if values is None:
            values = torch.empty(count, dtype=torch.float64)
        sent = values.to(self.device)
        source = dist.get_global_rank(self._stages, num_stages - 1)
        dist.broadcast(sent, src=source, group=self._stages)
        return sent.cpu()


def _host_group() -> Any:
    if not torch.cuda.is_available():
        return parallel_state.get_data_parallel_group()
    try:
        return parallel_state.get_data_parallel_group_gloo()
    except AssertionError as error:
        raise ValueError(
            "replicas tell each other their groups on the host, but initialize_model_parallel was "
            "called with create_gloo_process_groups=False; leave that argument out"
        ) from error


def total_over_replicas(sums: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Sums over the replicas, complete on the first rank of the job and empty elsewhere."""
    mine = dict(sums) if ranks.speaks_for_replica else {}
    parts: list[Any] | None = [None] * ranks.world_size if ranks.rank == 0 else None
    dist.gather_object(mine, parts)
    total: dict[str, float] = {}
    for part in parts or []:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
