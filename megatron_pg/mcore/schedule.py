"""Groups larger than a microbatch: their prefix stays resident on every pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_step
from megatron.core.utils import get_model_config
from torch import Tensor

from ..data import Wave
from .prefix_kv import PrefixKV


@dataclass(frozen=True)
class ScheduledRow:
    """One row on its way through the pipeline: what the iterator gives ``forward_step_func``.

    Attributes:
        row: an entry of ``Wave.prefix_rows`` or of ``Wave.microbatches``.
        prefix_kv: for ``PrefixGroupedSeqParams.from_layout``; None for microbatches.
        resident: for ``PrefixGroupedSeqParams.from_layout``; empty for prefix rows.
    """

    row: Any
    prefix_kv: PrefixKV | None = None
    resident: tuple[PrefixKV, ...] = ()


def prefix_resident_forward_backward(
    *,
    forward_step_func: Callable[..., Any],
    waves: Sequence[Wave],
    model: Any,
    seq_length: int,
    micro_batch_size: int = 1,
    mode: Literal["retain", "recompute"] = "retain",
    forward_only: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Gradients of the loss over all waves, each prefix encoded once per wave.

    Equals one call of what ``get_forward_backward_func()`` returns over rows in which every sample
    stands with its whole prefix: the same loss data, the same gradients, finalized once. Each wave
    runs three phases, each a pass over all pipeline stages:

    1. prefix forward: every layer keeps the keys and values of the prefix rows;
    2. suffix microbatches: Megatron's own schedule; attention sees the kept keys and values, and
       its backward pass adds up their gradients;
    3. prefix backward: those gradients enter at each layer and travel back through the stages.

    Args:
        forward_step_func: as Megatron takes it, but ``next(data_iterator)`` is a
            ``ScheduledRow``, whose ``prefix_kv`` and ``resident`` go into
            ``PrefixGroupedSeqParams``. The loss of a prefix row must be a zero that depends on the
            model's output (the sum of no logprobs), with 0 tokens if tokens are counted.
        waves: take the place of ``data_iterator`` and ``num_microbatches``.
        model: chunk or list of chunks of this rank.
        seq_length: as Megatron takes it.
        micro_batch_size: as Megatron takes it.
        mode: "retain" keeps the graph of the prefix rows over phase 2; "recompute" runs phase 1
            without a graph and once more, with one, in phase 3.
        forward_only: phases 1 and 2 without gradients.
        kwargs: whatever else Megatron's function takes.

    Returns:
        Loss data of the microbatches in order, as Megatron returns it.

    Raises:
        NotImplementedError: if parameters are gathered beside the forward pass
            (``param_sync_func``), which counts on one call per step.
        ValueError: if gradients are reduced beside the backward pass and ``no_sync_func`` is not
            there to hold that until the last one.
    """
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    config = get_model_config(chunks[0])
    total_rows = sum(len(wave.microbatches) for wave in waves)
    shared = {"seq_length": seq_length, "micro_batch_size": micro_batch_size} | kwargs

    def megatron(rows: Sequence[ScheduledRow], only_forward: bool) -> list[Any]:
        iterators: list[Iterator[ScheduledRow]] = [iter(rows) for _ in chunks]
        several = len(chunks) > 1
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=_scaled(forward_step_func, config, len(rows), total_rows),
            data_iterator=iterators if several else iterators[0],
            model=chunks if several else chunks[0],
            num_microbatches=len(rows),
            forward_only=only_forward,
            **shared,
        )
        return results

    if not any(wave.prefix_rows for wave in waves) and len(waves) == 1:
        return megatron([ScheduledRow(row) for row in waves[0].microbatches], forward_only)
    if not forward_only:
        _check_overlap(chunks, config)
    results: list[Any] = []
    finalization = _Finalization()
    with finalization.held(config):
        for number, wave in enumerate(waves):
            kept = tuple(PrefixKV() for _ in wave.prefix_rows)
            prefixes = [ScheduledRow(row, kv) for row, kv in zip(wave.prefix_rows, kept)]
            suffixes = [ScheduledRow(row, resident=kept) for row in wave.microbatches]
            keeps_graph = mode == "retain" and not forward_only
            is_last = number == len(waves) - 1
            retained = _RetainedRows(forward_step_func, chunks, config, prefixes)

            # Phase 1: prefix forward.
            if keeps_graph:
                retained.forward()
            elif prefixes:
                with torch.no_grad():
                    megatron(prefixes, only_forward=True)

            # Phase 2: suffix microbatches.
            syncs_later = not is_last or bool(prefixes)
            with _gradients_unsynced(config) if syncs_later else nullcontext():
                results += megatron(suffixes, forward_only)
            if forward_only or not prefixes:
                continue

            # Phase 3: prefix backward. The last one starts the reduction of gradients.
            with nullcontext() if is_last else _gradients_unsynced(config):
                if keeps_graph:
                    retained.backward()
                else:
                    megatron(prefixes, only_forward=False)
    finalization.run()
    return results


def _check_overlap(chunks: Sequence[Any], config: Any) -> None:
    if config.param_sync_func is not None:
        raise NotImplementedError(
            "resident prefixes do not work with overlap_param_gather (config.param_sync_func is "
            "set); turn it off, or set prefix_resident=never"
        )
    overlaps = any(
        getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False)
        for chunk in chunks
    )
    if overlaps and config.no_sync_func is None:
        raise ValueError(
            "overlap_grad_reduce=True needs config.no_sync_func with resident prefixes, which run "
            "several backward passes per step; set it to the no_sync method of the model (a list "
            "for several chunks)"
        )


def _scaled(
    forward_step_func: Callable[..., Any], config: Any, num_rows: int, total_rows: int
) -> Callable[..., Any]:
    """Losses that Megatron divides by the rows of a call, divided by the rows of all calls."""
    if config.calculate_per_token_loss or num_rows == total_rows:
        return forward_step_func

    def step(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        output, loss_func = forward_step_func(*args, **kwargs)

        def scaled_loss(*loss_args: Any, **loss_kwargs: Any) -> Any:
            loss, *others = loss_func(*loss_args, **loss_kwargs)
            return (loss * (num_rows / total_rows), *others)

        return output, scaled_loss

    return step


class _Finalization:
    """Gathers the finalizations that Megatron's calls ask for into one."""

    def __init__(self) -> None:
        self._function: Any = None
        self._calls: list[tuple[Any, Any, dict[str, Any]]] = []

    @contextmanager
    def held(self, config: Any) -> Iterator[None]:
        """Within, the configuration's function only notes its arguments."""
        self._function = config.finalize_model_grads_func
        if self._function is not None:
            config.finalize_model_grads_func = self._note
        try:
            yield
        finally:
            config.finalize_model_grads_func = self._function

    def run(self) -> None:
        """Finalize what was noted, with the tokens of all calls."""
        if self._calls:
            model, _, kwargs = self._calls[-1]
            counts = [tokens for _, tokens, _ in self._calls if tokens is not None]
            self._function(model, sum(counts[1:], counts[0]) if counts else None, **kwargs)

    def _note(self, model: Any, num_tokens: Any = None, **kwargs: Any) -> None:
        self._calls.append((model, num_tokens, kwargs))


@contextmanager
def _gradients_unsynced(config: Any) -> Iterator[None]:
    """Within, no backward pass starts the reduction of gradients over data-parallel ranks."""
    held = config.no_sync_func, config.grad_sync_func
    with _no_sync(config):
        config.no_sync_func, config.grad_sync_func = None, None
        try:
            yield
        finally:
            config.no_sync_func, config.grad_sync_func = held


def _no_sync(config: Any) -> ExitStack:
    functions = config.no_sync_func
    stack = ExitStack()
    for function in functions if isinstance(functions, list) else [functions]:
        if function is not None:
            stack.enter_context(function())
    return stack


class _RetainedRows:
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
        group = parallel_state.get_pipeline_model_parallel_group()
        self.stage, self.num_stages = group.rank(), group.size()
        self.p2p = P2PCommunicator(group, config)
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
                    cp_group_size=1,
                    vp_stage=chunk if last_chunk else None,
                    is_last_stage=is_last_stage,
                )
                self.outputs[tick.job] = output
            if tick.sends or tick.arrives is not None:
                received = self.p2p.send_forward_recv_forward(
                    output if tick.sends else None, tick.arrives is not None, self._shape
                )
                if tick.arrives is not None:
                    self.inputs[tick.arrives] = received

    def backward(self) -> None:
        """Send gradients back through all rows; each chunk's last one starts its reduction."""
        last_chunk = len(self.chunks) - 1
        gradients: dict[tuple[int, int], Tensor] = {}
        unsynced: ExitStack | None = _no_sync(self.config)
        position = self.num_stages - 1 - self.stage
        for tick in sweep(position, self.num_stages, len(self.chunks), len(self.rows)):
            gradient = None
            if tick.job is not None:
                order, row = tick.job
                place = last_chunk - order, row
                is_last_row = row == len(self.rows) - 1
                if is_last_row and unsynced is not None and self.config.grad_sync_func is None:
                    unsynced.close()
                torch.autograd.backward(self.outputs.pop(place), gradients.pop(tick.job, None))
                if place in self.inputs:
                    gradient = self.inputs.pop(place).grad
                if is_last_row:
                    self._start_sync(place[0], unsynced)
                    unsynced = _no_sync(self.config) if place[0] else None
            if tick.sends or tick.arrives is not None:
                received = self.p2p.send_backward_recv_backward(
                    gradient if tick.sends else None, tick.arrives is not None, self._shape
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

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Of the longest row's activations; stages that exchange shapes do not read it."""
        tokens = max(row.row.layout.total_tokens for row in self.rows)
        if self.config.sequence_parallel:
            tokens //= self.config.tensor_model_parallel_size
        return tokens, 1, self.config.hidden_size


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
