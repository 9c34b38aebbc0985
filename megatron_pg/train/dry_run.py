"""Check a config for any number of ranks in one process, without building weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data import balance_groups, equalize_num_microbatches, group_shape, plan_rows
from ..mcore import validate_config
from .config import TrainConfig
from .model import ModelPlan, plan_model
from .sources import load_tokenizer, make_task, read_recorded, sampling_params
from .trainer import packing_config


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        lines: a report for a person.
        parameters_per_rank: largest number of parameters on one rank.
        bytes_per_rank: weights, gradients, optimizer state and activations of the largest rank.
    """

    lines: tuple[str, ...]
    parameters_per_rank: int
    bytes_per_rank: int


def dry_run(config: TrainConfig, world_size: int) -> DryRun:
    """Parallel layout, packing plan, memory estimate and every refusal of a run.

    Raises:
        ValueError: listing everything that would stop the run.
    """
    problems: list[str] = []

    def attempt(action: Any, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except (ValueError, NotImplementedError) as error:
            problems.append(str(error))
            return None

    parallel = config.parallel
    model_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % model_size:
        problems.append(
            f"{world_size} ranks are no multiple of tensor x pipeline size {model_size}"
        )
    plan: ModelPlan | None = attempt(plan_model, config.model, parallel)
    if plan is not None:
        attempt(validate_config, plan.config)
        stages = parallel.pipeline_model_parallel_size * (
            parallel.virtual_pipeline_model_parallel_size or 1
        )
        if plan.config.num_layers % stages:
            problems.append(
                f"num_layers={plan.config.num_layers} is no multiple of {stages} stages"
            )
    if config.rollout.source == "recorded":
        if config.run.eval_prompts:
            problems.append("run.eval_prompts needs a source that samples; set it to 0")
        groups = attempt(read_recorded, config, plan.vocab_size) if plan else None
    else:
        groups = None
        tokenizer = attempt(load_tokenizer, config)
        if tokenizer is not None:
            attempt(make_task, config.rollout, tokenizer)
            attempt(sampling_params, config, tokenizer)
    lines: list[str] = []
    if plan is not None and not problems:
        dp_size = world_size // model_size
        lines.append(
            f"{world_size} ranks: tp {parallel.tensor_model_parallel_size}"
            f"{' with sp' if parallel.sequence_parallel else ''} x pp "
            f"{parallel.pipeline_model_parallel_size}"
            f" (vpp {parallel.virtual_pipeline_model_parallel_size or 1}) x dp {dp_size}"
        )
        if groups is not None:
            lines += attempt(_packing_lines, config, plan, groups, dp_size) or []
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} problem(s) would stop this run:\n{listed}")
    assert plan is not None
    parameters = parameters_per_rank(plan)
    total = _bytes_per_rank(config, plan, parameters, world_size // model_size)
    lines.append(f"largest rank: {parameters:,} parameters, about {total / 2**30:.2f} GiB")
    return DryRun(tuple(lines), parameters, total)


def _packing_lines(
    config: TrainConfig, plan: ModelPlan, groups: list[Any], dp_size: int
) -> list[str]:
    packing = packing_config(config, plan)
    shapes = [
        group_shape(group, packing.min_shared) for group in groups[: config.run.groups_per_step]
    ]
    plans = [
        plan_rows(
            shapes,
            packing.max_tokens,
            members=members,
            cost_model=packing.cost_model,
            pad_to_multiple=packing.pad_to_multiple,
        )
        for members in balance_groups(shapes, dp_size, packing.cost_model)
    ]
    plans = equalize_num_microbatches(
        plans, multiple_of=packing.num_microbatches_multiple, cost_model=packing.cost_model
    )
    layouts = [p.row_layout(i) for p in plans for i, row in enumerate(p.rows) if row]
    unique = sum(layout.unique_tokens for layout in layouts)
    logical = sum(layout.logical_tokens for layout in layouts)
    return [
        f"first step: {len(shapes)} groups, {logical:,} logical tokens, {unique:,} encoded "
        f"(reuse {logical / unique:.2f}x), {len(plans[0].rows)} microbatches a rank"
    ]


def parameters_per_rank(plan: ModelPlan) -> int:
    """Parameters of the largest rank: its layers, and the embedding and output it may hold."""
    config = plan.config
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    heads, groups = (
        config.num_attention_heads,
        config.num_query_groups or config.num_attention_heads,
    )
    attention = config.hidden_size * config.kv_channels * (2 * heads + 2 * groups)
    matrices = 3 if config.gated_linear_unit else 2
    ffn, experts = config.ffn_hidden_size, 1
    if config.num_moe_experts:
        ffn = config.moe_ffn_hidden_size or ffn
        experts = config.num_moe_experts // config.expert_model_parallel_size
    layer = (attention + experts * matrices * config.hidden_size * ffn) // tp
    layer += 2 * config.hidden_size
    embedding = plan.gpt["vocab_size"] * config.hidden_size // tp
    tables = 2 if pp == 1 and not plan.gpt["share_embeddings_and_output_weights"] else 1
    return int(config.num_layers // pp * layer + tables * embedding)


def _bytes_per_rank(config: TrainConfig, plan: ModelPlan, parameters: int, dp_size: int) -> int:
    """Weights, fp32 gradients, Adam state and master weights, activations of one microbatch."""
    width = plan.config.params_dtype.itemsize
    state = 8 + (4 if width < 4 else 0)
    shards = dp_size if config.parallel.use_distributed_optimizer else 1
    model = parameters * (width + 4) + parameters * state // shards
    if config.algorithm.needs_reference:
        model += parameters * width
    c = plan.config
    tp = c.tensor_model_parallel_size
    heads, groups = c.num_attention_heads, c.num_query_groups or c.num_attention_heads
    per_token = (
        4 * c.hidden_size
        + (2 * heads + 2 * groups) * c.kv_channels // tp
        + (3 if c.gated_linear_unit else 2) * c.ffn_hidden_size // tp
    )
    if c.recompute_granularity == "full":
        per_token = c.hidden_size
    rows = config.run.max_tokens_per_microbatch
    # 1F1B: the first stage holds one microbatch per stage, each with its share of the layers.
    activations = rows * per_token * width * c.num_layers
    head = config.run.logprob_chunk_tokens * plan.gpt["vocab_size"] // tp * 4 * 2
    return int(model + activations + head)
