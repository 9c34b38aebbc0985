"""Groups larger than a microbatch: their prefix stays resident on every pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from ...data import ResidentMode, Wave
from ..resident import PrefixKV, ScheduledRow
from ..routers import has_router_losses
from .exchange import known_exchange
from .sweep import RetainedRows, no_sync


def prefix_resident_forward_backward(
    *,
    forward_step_func: Callable[..., Any],
    waves: Sequence[Wave],
    model: Any,
    seq_length: int,
    micro_batch_size: int = 1,
    mode: ResidentMode = "retain",
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
            (``param_sync_func``), which counts on one call per step; if routers lose and
            ``calculate_per_token_loss`` is off.
        ValueError: if gradients are reduced beside the backward pass and ``no_sync_func`` is not
            there to hold that until the last one, or if ``mode`` is neither of the two.
    """
    if mode not in (modes := get_args(ResidentMode)):
        raise ValueError(f"mode={mode!r} must be one of {', '.join(modes)}")
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
            **(known_exchange(config, rows, len(chunks)) | shared),
        )
        return results

    is_one_call = not any(wave.prefix_rows for wave in waves) and len(waves) == 1
    if not forward_only:
        if not is_one_call:
            _check_one_call(config)
        _check_reduction(chunks, config)
    if is_one_call:
        return megatron([ScheduledRow(row) for row in waves[0].microbatches], forward_only)
    results: list[Any] = []
    finalization = _Finalization()
    with finalization.held(config):
        for number, wave in enumerate(waves):
            kept = tuple(PrefixKV() for _ in wave.prefix_rows)
            prefixes = [ScheduledRow(row, kv) for row, kv in zip(wave.prefix_rows, kept)]
            suffixes = [ScheduledRow(row, resident=kept) for row in wave.microbatches]
            keeps_graph = mode == "retain" and not forward_only
            is_last = number == len(waves) - 1
            retained = RetainedRows(forward_step_func, chunks, config, prefixes)

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


def _check_one_call(config: Any) -> None:
    """Refuse what counts on one call of Megatron's schedule a step."""
    if config.param_sync_func is not None:
        raise NotImplementedError(
            "resident prefixes do not work with overlap_param_gather (config.param_sync_func is "
            "set); turn it off, or set prefix_resident=never"
        )
    if has_router_losses(config) and not config.calculate_per_token_loss:
        raise NotImplementedError(
            "losses of routers (moe_aux_loss_coeff, moe_z_loss_coeff) with several waves or "
            "resident prefixes need calculate_per_token_loss=True: else Megatron averages them "
            "over the rows of one phase; set it, or prefix_resident=never"
        )


def _check_reduction(chunks: Sequence[Any], config: Any) -> None:
    """Refuse to reduce gradients beside a backward pass that nobody says is the last one."""
    overlaps = any(
        getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False)
        for chunk in chunks
    )
    if overlaps and config.no_sync_func is None:
        raise ValueError(
            "overlap_grad_reduce=True needs config.no_sync_func: a step runs as many backward "
            "passes as its groups fill rows, and only the last one may start the reduction; set "
            "it to the no_sync method of the model (a list for several chunks)"
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
    with no_sync(config):
        # Whether there is one still says that gradients are reduced beside the backward.
        inner = None if held[0] is None else nullcontext
        config.no_sync_func, config.grad_sync_func = inner, None
        try:
            yield
        finally:
            config.no_sync_func, config.grad_sync_func = held
