"""Memory of the ranks of every pipeline stage, by what takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...data import MemoryModel
from ...loss import head_bytes
from ...mcore import layer_windows, layers_of_stages
from ...parallel import ParallelSizes
from ..config import TrainConfig, config_problems
from ..model import ModelPlan, plan_model
from .in_flight import held_by_backward, kept_of_chunk, passes_in_flight, states_of_chunk
from .layers import layer_memory
from .parameters import ModelModules, Parameters
from .rows import RowsOf, StepRows

# CUDA's context, workspaces of its libraries, buffers of communicators; and what the allocator
# cannot use of the blocks that come and go. An allowance, measured on no cluster.
_RUNTIME_BYTES = 2 << 30
_FRAGMENTS = 0.05
RESIDENT = "resident prompts"


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage.

    Attributes:
        stage: its number, from 0.
        num_layers: that it holds.
        parameters: that it holds.
        terms: what takes memory on the device at the fullest time.
        checkpoint: what it writes of a checkpoint, copied to host memory before.
        updated: parameters whose optimizer state it holds.
    """

    stage: int
    num_layers: int
    parameters: Parameters
    terms: Mapping[str, int]
    checkpoint: int
    updated: float

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.terms.values())


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """Of all ranks of a run: those of one pipeline stage are alike.

    Attributes:
        config: of the run.
        plan: of its model.
        sizes: of its parallel layout.
        rows: of a step.
        modules: whose parameters are counted.
        rows_of: how a run with other settings would pack its first step.
    """

    config: TrainConfig
    plan: ModelPlan
    sizes: ParallelSizes
    rows: StepRows
    modules: ModelModules
    rows_of: RowsOf

    @property
    def stages(self) -> list[StageMemory]:
        """Of a rank of every pipeline stage."""
        parameters = self.modules.stage_parameters(self.plan)
        chunks = layers_of_stages(self.plan.config)
        return [self._stage(n, of_stage, parameters[n]) for n, of_stage in enumerate(chunks)]

    @property
    def fullest(self) -> StageMemory:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.total)

    def changed(self, **sections: Any) -> RunMemory | None:
        """With other sections of the configuration, on as many ranks; None if it is refused."""
        config = replace(self.config, **sections)
        if config_problems(config):
            return None
        try:
            plan = plan_model(config.model, config.parallel, card=self.plan.card)
            sizes = ParallelSizes.from_config(config.parallel, self.sizes.world_size)
        except (ValueError, NotImplementedError):
            return None
        # On fewer replicas rows are more.
        rows = replace(self.rows, tokens=config.prefix_group.max_tokens_per_microbatch)
        if sizes != self.sizes:
            rows = replace(rows, number=None)
        return replace(self, config=config, plan=plan, sizes=sizes, rows=rows)

    def fits(self, capacity: int) -> bool:
        """Whether a run that was changed takes no more, with the rows that it would have."""
        if self.fullest.total > capacity:
            return False
        rows = self.rows_of(self.config, self.plan, self.sizes.dp)
        return rows is not None and replace(self, rows=rows).fullest.total <= capacity

    def _stage(
        self, stage: int, chunks: Sequence[Sequence[int]], parameters: Parameters
    ) -> StageMemory:
        is_distributed = self.config.parallel.use_distributed_optimizer
        shared = _of_writers(parameters, self.sizes)
        updated = shared if is_distributed else float(parameters.total)
        width: int = self.plan.config.params_dtype.itemsize
        # Adam's two moments, and fp32 weights beside narrower ones.
        state = 8 + (4 if width < 4 else 0)
        moving = _moving_terms(self, stage, chunks)
        terms = {
            "weights": parameters.total * width,
            "gradients": parameters.total * max(width, 4),
            "optimizer": int(updated * state),
            "reference": _reference_bytes(self.config, parameters.total * width, moving),
            **moving,
        }
        if self.plan.on_cuda:
            terms["runtime"] = _RUNTIME_BYTES + int(_FRAGMENTS * sum(moving.values()))
        # Data-parallel ranks write a share each; a distributed optimizer has its own weights.
        written = width + (12 if is_distributed else state)
        return StageMemory(
            stage=stage,
            num_layers=sum(map(len, chunks)),
            parameters=parameters,
            terms={name: size for name, size in terms.items() if size},
            checkpoint=math.ceil(shared * written),
            updated=updated,
        )


def _of_writers(parameters: Parameters, sizes: ParallelSizes) -> float:
    """Parameters of a rank among those that hold the same."""
    replicas = sizes.dp * sizes.cp
    expert_replicas = sizes.world_size // (sizes.pp * sizes.ep * sizes.expert_tp)
    return parameters.shared / replicas + parameters.experts / max(expert_replicas, 1)


def _reference_bytes(config: TrainConfig, weights: int, moving: Mapping[str, int]) -> int:
    algorithm = config.algorithm
    if not algorithm.needs_reference:
        return 0
    if algorithm.ref_offload or algorithm.precompute_ref_logprobs:
        # There only while no activations are kept.
        return max(weights - sum(moving.values()), 0)
    return weights


def _moving_terms(run: RunMemory, stage: int, chunks: Sequence[Sequence[int]]) -> dict[str, int]:
    """What comes and goes with rows."""
    model, sizes, rows = run.plan.config, run.sizes, run.rows
    tokens, is_last = -(-rows.tokens // sizes.cp), stage == sizes.pp - 1
    kinds = run.plan.layer_kinds
    of_kind = {kind: layer_memory(run.plan, kind) for kind in set(kinds)}
    layers = [[of_kind[kinds[number]] for number in chunk] for chunk in chunks]
    passes = passes_in_flight(stage, sizes.pp, sizes.vpp or 1, rows.number)
    hidden = model.hidden_size * model.params_dtype.itemsize // sizes.sp_size
    # The last norm keeps what it reads and returns.
    held = 2 * hidden if is_last else 0
    held += sum(n * kept_of_chunk(chunk, model) for n, chunk in zip(passes, layers))
    # Every segment begins from a state in layers that have one.
    states = sum(n * states_of_chunk(chunk, model) for n, chunk in zip(passes, layers))
    # A stage may have the embedding alone.
    in_turn = [0, *(tokens * held_by_backward(chunk, model) for chunk in layers if chunk)]
    in_turn += [_head_bytes(run, tokens)] if is_last else []
    sent = 0
    if sizes.pp > 1:
        # What arrives from and goes to each neighbour, and what was sent, unless it is freed.
        waiting = 0 if model.deallocate_pipeline_outputs or is_last else sum(passes)
        neighbours = (stage > 0) + (not is_last)
        sent = (2 * neighbours + waiting) * tokens * hidden
    return {
        "activations": tokens * held + rows.segments * states,
        RESIDENT: _resident_bytes(run, layers, chunks),
        "logits or a layer's backward pass": max(in_turn, default=0),
        "pipeline buffers": sent,
    }


def _head_bytes(run: RunMemory, tokens: int) -> int:
    model = run.plan.config
    return head_bytes(
        tokens,
        model.hidden_size,
        run.plan.gpt["vocab_size"] // run.sizes.tp,
        dtype=model.params_dtype,
        device=torch.device("cuda" if run.plan.on_cuda else "cpu"),
        chunk_tokens=run.config.prefix_group.logprob_chunk_tokens,
        has_weight_grad=model.gradient_accumulation_fusion,
    )


def _resident_bytes(
    run: RunMemory, layers: Sequence[Sequence[MemoryModel]], chunks: Sequence[Sequence[int]]
) -> int:
    """What resident prompts keep on a stage beside its microbatches."""
    rows, windows = run.rows, layer_windows(run.plan.config)
    mode = run.config.prefix_group.prefix_resident_mode
    per_token = sum(
        memory.resident(mode, rows.shares.get(windows[number], 1.0))
        for of_chunk, numbers in zip(layers, chunks)
        for memory, number in zip(of_chunk, numbers)
    )
    per_prompt = sum(memory.state + memory.state_grads for chunk in layers for memory in chunk)
    # Context-parallel ranks divide heads, or latents of tokens.
    tokens = -(-rows.resident_tokens // run.sizes.cp)
    return int(tokens * per_token) + rows.resident_prompts * per_prompt
