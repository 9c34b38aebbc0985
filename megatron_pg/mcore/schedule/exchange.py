"""Exchange of activations between stages that all know every row beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection

from ...parallel import ParallelSizes
from ..resident import ScheduledRow

# What Megatron's schedules ask of a collection, which they take together with a communicator.
_GROUPS = ["tp", "pp", "cp", "embd", "pos_embd", "dp", "dp_cp", "tp_dp_cp"]


class KnownShapes(P2PCommunicator):
    """``P2PCommunicator`` that asks its neighbours for no shape.

    Equals the stock one under ``variable_seq_lengths``, which sends the shape of every activation
    ahead and waits for the device twice to read it. Rows pass a link between two stages in one
    order, forward as backward, which all stages know.

    Args:
        group: of the pipeline.
        config: the model's.
        within: tokens of the rows in the order in which they pass from one stage to the next.
        around: of those that pass from the last stage to the next chunk of the first.
    """

    def __init__(
        self, group: dist.ProcessGroup, config: Any, within: Sequence[int], around: Sequence[int]
    ) -> None:
        super().__init__(group, config)
        before = around if group.rank() == 0 else within
        after = around if group.rank() == group.size() - 1 else within
        self._forward_in, self._backward_out = _Link(before), _Link(before)
        self._forward_out, self._backward_in = _Link(after), _Link(after)
        self._split = ParallelSizes.from_config(config).row_multiple

    @classmethod
    def of_schedule(cls, config: Any, rows: Sequence[ScheduledRow], num_chunks: int) -> KnownShapes:
        """For one call of Megatron's schedule over these rows."""
        lens = [row.row.layout.total_tokens for row in rows]
        if num_chunks == 1:
            return cls(_pipeline(), config, lens, ())
        group_size = config.microbatch_group_size_per_vp_stage
        within, around = (
            [lens[row] for row, _ in get_schedule_table(len(lens), num, group_size)]
            for num in (num_chunks, num_chunks - 1)
        )
        return cls(_pipeline(), config, within, around)

    @classmethod
    def of_sweep(cls, config: Any, rows: Sequence[ScheduledRow], num_chunks: int) -> KnownShapes:
        """For rows that go through all chunks one after another (see ``sweep``)."""
        lens = [row.row.layout.total_tokens for row in rows]
        return cls(_pipeline(), config, lens * num_chunks, lens * (num_chunks - 1))

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """Shapes of what arrives; what is sent is held to its own."""
        for link, tensor in (
            (self._forward_out, tensor_send_next),
            (self._backward_out, tensor_send_prev),
        ):
            if tensor is not None and list(tensor.shape) != (shape := self._shape(link)):
                raise ValueError(
                    f"a stage has a tensor of shape {list(tensor.shape)} to send where the rows of "
                    f"the schedule say {shape}; run every row in its place with its whole layout"
                )
        return (
            self._shape(self._forward_in) if recv_prev else [0, 0, 0],
            self._shape(self._backward_in) if recv_next else [0, 0, 0],
        )

    def _shape(self, link: _Link) -> list[int]:
        return [link.next_tokens() // self._split, 1, self.config.hidden_size]


class _Link:
    """Rows still to pass in one direction."""

    def __init__(self, lens: Sequence[int]) -> None:
        self._lens = iter(lens)

    def next_tokens(self) -> int:
        tokens = next(self._lens, None)
        assert tokens is not None, "more rows pass than the schedule has"
        return tokens


def known_exchange(config: Any, rows: Sequence[ScheduledRow], num_chunks: int) -> dict[str, Any]:
    """Arguments with which a schedule of Megatron exchanges rows whose lengths are known."""
    if config.pipeline_model_parallel_size == 1:
        return {}
    return {
        "p2p_communicator": KnownShapes.of_schedule(config, rows, num_chunks),
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(_GROUPS),
    }


def _pipeline() -> dist.ProcessGroup:
    group: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
    return group
