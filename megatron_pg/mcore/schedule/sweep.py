"""Rows that pass all stages together: forward once, and back again with their graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import (
    custom_backward,
    deallocate_output_tensor,
    forward_step,
)
from torch import Tensor

from ..resident import ScheduledRow
from .exchange import KnownShapes

# In the place of a shape, which the communicator knows.
_UNREAD = ()


@dataclass(frozen=True)
class Tick:
    """One step of a sweep on one stage.

    Attributes:
        job: chunk and row to be computed, or None.
        sends: whether the result goes to the next stage of the sweep.
        arrives: chunk and row whose input comes from the stage before, or None.
    """

    job: tuple[int, int] | None
    sends: bool
    arrives: tuple[int, int] | None


def sweep(position: int, num_stages: int, num_chunks: int, num_rows: int) -> Iterator[Tick]:
    """Ticks of one stage while all rows pass all chunks of all stages once, in lock-step.

    Stage p computes slot t - p in tick t; slot ``c * period + i`` is row i of chunk c. After the
    last stage a row goes on to the first stage's next chunk, ``period`` slots later. For two
    stages, two chunks and three rows (chunk.row)::

        position 0   0.0  0.1  0.2  1.0  1.1  1.2   -
        position 1    -   0.0  0.1  0.2  1.0  1.1  1.2

    Args:
        position: of the stage in the direction of the sweep.
        num_stages: of the pipeline.
        num_chunks: model chunks of a stage.
        num_rows: rows that pass.
    """
    # A row comes back to the first stage no earlier than num_stages slots later.
    period = max(num_rows, num_stages) if num_chunks > 1 else num_rows

    def job(slot: int) -> tuple[int, int] | None:
        chunk, row = divmod(slot, max(period, 1))
        return (chunk, row) if 0 <= chunk < num_chunks and row < num_rows else None

    if not num_rows:
        return
    for tick in range((num_chunks - 1) * period + num_rows + num_stages - 1):
        mine = job(tick - position)
        is_end = mine is not None and position == num_stages - 1 and mine[0] == num_chunks - 1
        if position:
            arrives = job(tick - position + 1)
        else:
            before = job(tick - (num_stages - 1))
            goes_on = before is not None and before[0] + 1 < num_chunks
            arrives = (before[0] + 1, before[1]) if before is not None and goes_on else None
        yield Tick(mine, mine is not None and not is_end, arrives)


class RetainedRows:
    """Rows whose graph is kept between a forward and a backward sweep over all stages.

    Args:
        forward_step_func: of the schedule.
        chunks: of this rank.
        config: the model's.
        rows: to be encoded.
    """

    def __init__(
        self,
        forward_step_func: Callable[..., Any],
        chunks: Sequence[Any],
        config: Any,
        rows: Sequence[ScheduledRow],
    ) -> None:
        self.forward_step_func = forward_step_func
        self.chunks = chunks
        self.config = config
        self.rows = rows
        self.p2p = KnownShapes.of_sweep(config, rows, len(chunks))
        self.stage, self.num_stages = self.p2p.pp_group.rank(), self.p2p.pp_group.size()
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}

    def forward(self) -> None:
        """Encode all rows, chunk by chunk."""
        last_chunk = len(self.chunks) - 1
        for tick in sweep(self.stage, self.num_stages, len(self.chunks), len(self.rows)):
            output = None
            if tick.job is not None:
                chunk, row = tick.job
                is_last_stage = self.stage == self.num_stages - 1 and chunk == last_chunk
                output, _ = forward_step(
                    self.forward_step_func,
                    iter([self.rows[row]]),
                    self.chunks[chunk],
                    len(self.rows),
                    self.inputs.get(tick.job),
                    [],
                    self.config,
                    cp_group_size=self.config.context_parallel_size,
                    vp_stage=chunk if last_chunk else None,
                    is_last_stage=is_last_stage,
                )
                self.outputs[tick.job] = output
            if tick.sends or tick.arrives is not None:
                received = self.p2p.send_forward_recv_forward(
                    output if tick.sends else None, tick.arrives is not None, _UNREAD
                )
                if tick.sends:
                    deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)
                if tick.arrives is not None:
                    self.inputs[tick.arrives] = received

    def backward(self) -> None:
        """Send gradients back through all rows; each chunk's last one starts its reduction."""
        last_chunk = len(self.chunks) - 1
        gradients: dict[tuple[int, int], Tensor] = {}
        unsynced: ExitStack | None = no_sync(self.config)
        frees_outputs = self.config.deallocate_pipeline_outputs
        go_back = custom_backward if frees_outputs else torch.autograd.backward
        position = self.num_stages - 1 - self.stage
        for tick in sweep(position, self.num_stages, len(self.chunks), len(self.rows)):
            gradient = None
            if tick.job is not None:
                order, row = tick.job
                place = last_chunk - order, row
                is_last_row = row == len(self.rows) - 1
                if is_last_row and unsynced is not None and self.config.grad_sync_func is None:
                    unsynced.close()
                output, output_gradient = self.outputs.pop(place), gradients.pop(tick.job, None)
                # Without a trained parameter before it, a row has no graph to go back through.
                if output.requires_grad:
                    go_back(output, output_gradient)
                if place in self.inputs:
                    gradient = self.inputs.pop(place).grad
                if is_last_row:
                    self._start_sync(place[0], unsynced)
                    unsynced = no_sync(self.config) if place[0] else None
            if tick.sends or tick.arrives is not None:
                received = self.p2p.send_backward_recv_backward(
                    gradient if tick.sends else None, tick.arrives is not None, _UNREAD
                )
                if tick.arrives is not None:
                    gradients[tick.arrives] = received

    def _start_sync(self, chunk: int, unsynced: ExitStack | None) -> None:
        function = self.config.grad_sync_func
        if function is None:
            return
        if unsynced is not None:
            unsynced.close()
        function = function[chunk] if isinstance(function, list) else function
        function(self.chunks[chunk].parameters())


def no_sync(config: Any) -> ExitStack:
    """The entered contexts in which no backward pass starts the reduction of gradients."""
    functions = config.no_sync_func
    stack = ExitStack()
    for function in functions if isinstance(functions, list) else [functions]:
        if function is not None:
            stack.enter_context(function())
    return stack
