"""verl's Megatron engine, its forward and backward passes over packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.megatron_utils import unwrap_model
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron import MegatronEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from ...data import RouteShape
from ...grpo import MegatronReplicas, PrefixGroupConfig, Ranks, RouteRecord
from ...mcore import (
    Predictions,
    PrefixGroupedGPTModel,
    PrefixGroupedSeqParams,
    ScheduledRow,
    attention_backends,
    check_replayable,
    count_attention_calls,
    prefix_resident_forward_backward,
    validate_config,
    with_prefix_grouped_attention,
)
from .packing import MiniBatch, Samples, pack_mini_batch
from .rebound import rebound
from .refusals import check_batch, check_engine
from .replay import Replay, recorded_routes
from .rows import VerlRow
from .settings import packing_config, read_settings

VENDOR = "prefix_grouped"


@EngineRegistry.register("language_model", "megatron", device="cuda", vendor=VENDOR)
class PrefixGroupedMegatronEngine(MegatronEngineWithLMHead):
    """``MegatronEngineWithLMHead`` that encodes what samples of a group share once.

    Equals it: losses, gradients, logprobs and entropies are those of the written-out samples, in
    the order of the batch. Its forward and backward loop, losses, optimizer, checkpoints and weight
    exports are verl's. Rows hold ``max_token_len_per_gpu`` unique tokens, times
    ``context_parallel_size``.

    Raises:
        NotImplementedError: listing every setting of verl that it does not honour.
        ValueError: listing every setting of the model that packed rows do not support.
    """

    _record: RouteRecord | None = None

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ):
        check_engine(model_config, engine_config)
        read_settings(engine_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def initialize(self) -> None:
        """As verl's; says that this engine is active, since verl hides plug-ins that fail."""
        super().initialize()
        if dist.get_rank() == 0:
            role = "logprobs only" if self.engine_config.forward_only else "training"
            backends = ", ".join(attention_backends(unwrap_model(self.module[0])))
            print(f"megatron_pg: prefix-grouped engine is active ({role}; attention: {backends})")

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> Any:
        """As verl's, over packed rows; its metrics say what was shared."""
        known = loss_function is None or getattr(loss_function, "func", loss_function) is ppo_loss
        check_batch(data, reads_samples_alone=known)
        mode, shape = self.engine_config.router_replay.mode, RouteShape.from_config(self.tf_config)
        replay = Replay.of(data, mode, shape, forward_only=forward_only)
        samples = Samples.of(data, responses_only=known, routes=replay.routes)
        # Rows are in no order of the batch, whatever decides them; verl then puts samples back.
        data = data.copy()
        # Rows have them.
        if replay.routes is not None:
            del data["routed_experts"]
        tu.assign_non_tensor(data, enable_routing_replay=False)
        is_dynamic = bool(tu.get_non_tensor_data(data, "use_dynamic_bsz", True))
        tu.assign_non_tensor(data, use_dynamic_bsz=True)
        packed: list[MiniBatch] = []

        def prepare_micro_batches(data: TensorDict, **_: Any) -> tuple[list[TensorDict], Any]:
            packed.append(self._pack(data, samples, is_dynamic))
            return packed[0].micro_batches, packed[0].indices

        def get_forward_backward_func() -> Callable[..., Any]:
            return partial(
                _run,
                waves=packed[0].waves,
                mode=self._prefix_group.prefix_resident_mode,
            )

        self._record = replay.record
        before = self._attention_calls()
        run = rebound(
            super().forward_backward_batch,
            prepare_micro_batches=prepare_micro_batches,
            get_forward_backward_func=get_forward_backward_func,
        )
        output = run(data, loss_function, forward_only)
        self._record = None
        if replay.record is not None and shape is not None:
            stages = parallel_state.get_pipeline_model_parallel_group()
            routes = recorded_routes(packed[0], replay.record, shape, stages, get_device_id())
            if output:
                output["model_output"]["routed_experts"] = routes
        if output:
            _fill_up(output["metrics"], len(packed[0].indices))
            output["metrics"].update(self._metrics(packed[0], self._attention_calls() - before))
        return output

    def forward_step(
        self,
        batch_iter: Iterator[ScheduledRow],
        model: Any,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Callable[..., Any],
    ) -> Any:
        """As verl's; what comes from ``batch_iter`` is a row of the schedule."""
        scheduled = next(batch_iter)
        row = scheduled.row
        is_read = isinstance(row, VerlRow) and not row.is_filler
        params = PrefixGroupedSeqParams.from_layout(
            row.layout,
            get_device_id(),
            predictions=self._predictions(row) if is_read else _NOTHING,
            prefix_kv=scheduled.prefix_kv,
            resident=scheduled.resident,
            sample_counts=row.sample_counts,
            routed_experts=row.routed_experts,
            record_routes=None if self._record is None else self._record.recorder(row),
        )
        tokens = row.tokens.to(params.position_ids.device, non_blocking=True)
        output = model(tokens[None], params.position_ids[None], None, packed_seq_params=params)
        if not is_read:
            return output, _no_loss

        def loss(output: tuple[Tensor, Tensor | None]) -> Any:
            batch = row.batch.to(get_device_id())
            values = row.model_output(output)
            return self._counted(*postprocess_micro_batch_func(values, data=batch), batch=batch)

        return output, loss

    def _build_tf_config(self) -> None:
        super()._build_tf_config()
        for config in (self.provider, self.tf_config):
            # Megatron's own replay, which verl turns on, goes by the order of calls.
            for name in ("moe_enable_routing_replay", "enable_routing_replay"):
                if getattr(config, name, False):
                    setattr(config, name, False)
        if self.engine_config.router_replay.mode != "disabled":
            check_replayable(self.provider)
        validate_config(self.provider)
        self.provider.transformer_layer_spec = partial(
            _wrapped_spec,
            self.provider.transformer_layer_spec,
            self._prefix_group.attention_backend,
        )

    def _build_megatron_module(self) -> Any:
        module = super()._build_megatron_module()
        for chunk in module:
            model = unwrap_model(chunk)
            if type(model) is not GPTModel:
                raise NotImplementedError(
                    f"Megatron Bridge built a {type(model).__name__}; the prefix-grouped engine "
                    "trains Megatron-Core's GPTModel"
                )
            # It has the same state and other methods.
            model.__class__ = PrefixGroupedGPTModel
        return module

    @property
    def _prefix_group(self) -> PrefixGroupConfig:
        return read_settings(self.engine_config)

    def _pack(self, data: TensorDict, samples: Samples, is_dynamic: bool) -> MiniBatch:
        settings = self._prefix_group
        budget = sum(map(len, samples.sequences))
        if is_dynamic:
            # Of a context-parallel rank, which has an equal part of every row.
            budget = data["max_token_len_per_gpu"] * self.engine_config.context_parallel_size
        chunks = unwrap_model(list(self.module))
        return pack_mini_batch(
            data,
            samples,
            packing_config(settings, self.tf_config, chunks, budget),
            MegatronReplicas(Ranks.from_megatron()),
            min_shared=settings.min_shared,
            samples_per_row=None if is_dynamic else data["micro_batch_size_per_gpu"],
        )

    def _predictions(self, row: VerlRow) -> Predictions:
        return row.predictions(
            with_entropy=bool(tu.get_non_tensor_data(row.batch, "calculate_entropy", False)),
            chunk_tokens=self._prefix_group.logprob_chunk_tokens,
        )

    def _counted(self, loss: Tensor, *counts: Any, batch: TensorDict) -> Any:
        """What a loss function returns; of context-parallel ranks the first counts the tokens.

        verl has each count its share, rounded down, and Megatron divides by what they count.
        """
        if len(counts) == 1:
            return loss, *counts
        is_first = parallel_state.get_context_parallel_rank() == 0
        num_tokens = self._routed_num_tokens(batch).to(torch.int)
        return loss, num_tokens * is_first, *counts[1:]

    def _attention_calls(self) -> int:
        chunks = unwrap_model(list(self.module))
        return sum(count_attention_calls(chunk).prefix_grouped for chunk in chunks)

    def _metrics(self, packed: MiniBatch, num_calls: int) -> dict[str, list[float]]:
        """Of the rows of all replicas; verl's trainer averages over ranks and mini-batches."""
        tokens = packed.tokens
        values = {
            "reuse_ratio": tokens.logical / max(tokens.unique, 1),
            "unique_tokens": float(tokens.unique),
            "logical_tokens": float(tokens.logical),
            "rows": float(tokens.rows),
            "resident_groups": float(tokens.resident_groups),
            "split_tokens": float(tokens.split),
            "packed_calls": float(num_calls),
        }
        return {f"prefix_grouped/{name}": [value] for name, value in values.items()}


_NOTHING = Predictions(
    predictor_ids=torch.empty(0, dtype=torch.int64), target_tokens=torch.empty(0, dtype=torch.int64)
)


def _no_loss(output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, dict[str, Any]]:
    """Of a row that nothing is read of: a zero with a graph, no tokens and no entry for verl."""
    return output[0].sum(), {}


def _fill_up(metrics: dict[str, Any], num_rows: int) -> None:
    """Values for rows that nothing is read of, which change nothing that is made of the others.

    verl aggregates over ranks value by value, and ranks have as many rows, not as many with
    samples.
    """
    for metric in metrics.values():
        if isinstance(metric, Metric):
            is_sum = metric.aggregation is AggregationType.SUM
            value = 0.0 if is_sum else float(metric.aggregate())
            metric.extend([value] * (num_rows - len(metric.values)))


def _run(*, data_iterator: Any, num_microbatches: int, **kwargs: Any) -> Any:
    """What Megatron's schedule is called with, run over waves: they hold the same micro-batches."""
    return prefix_resident_forward_backward(**kwargs)


def _wrapped_spec(given: Any, backend: str, config: Any, vp_stage: int | None = None) -> Any:
    """What Megatron Bridge's provider would take, wrapped."""
    if not isinstance(given, ModuleSpec) and callable(given):
        takes_stage = "vp_stage" in signature(given).parameters
        given = given(config, vp_stage=vp_stage) if takes_stage else given(config)
    return with_prefix_grouped_attention(given, backend)
