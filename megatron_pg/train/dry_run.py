"""Check a config for any number of ranks in one process, without building weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..data import (
    AttentionSizes,
    MemoryModel,
    PackPlan,
    active_ffn_hidden_size,
    group_shape,
    without_aborted,
)
from ..grpo import (
    TokenCounts,
    count_tokens,
    plan_all_replicas,
)
from ..mcore import layer_windows, validate_config
from ..parallel import ParallelSizes
from ..rollout import FilePrompts
from .config import TrainConfig, config_problems, raise_problems
from .model import (
    ModelPlan,
    expert_layers_per_stage,
    layers_per_stage,
    plan_model,
    training_configs,
    validate_trainable,
    validate_weights,
)
from .rollouts import (
    Recording,
    Sampling,
    check_held_out,
    open_sampling,
    read_recording,
    routes_of_run,
)

T = TypeVar("T")


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        lines: a report for a person.
        parameters_per_rank: largest number of parameters on one rank.
        bytes_per_rank: weights, gradients, optimizer state and activations of the largest rank.
        resident_bytes_per_rank: of these, what resident prompts keep.
    """

    lines: tuple[str, ...]
    parameters_per_rank: int
    bytes_per_rank: int
    resident_bytes_per_rank: int


def dry_run(config: TrainConfig, world_size: int) -> DryRun:
    """Parallel layout, packing plan, memory estimate and every refusal of a run.

    Left open is what depends on the machine of the run, its accelerator and its memory, on its
    inference server and on what lies in ``run.out``. Of weights only the headers are read: those of
    another model than ``model.hf`` are refused by the run, when it loads them.

    Raises:
        ValueError: listing everything else that would stop the run.
    """
    problems = config_problems(config) + config.parallel.sizes.launch_problems(world_size)

    def attempt(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except (ValueError, NotImplementedError, ImportError) as error:
            problems.append(str(error).replace("\n", "\n    "))
            return None

    plan: ModelPlan | None = None
    if config.model.hf is not None or config.model.vocab_size is not None:
        plan = attempt(lambda: plan_model(config.model, config.parallel))
    recording: Recording | None = None
    if plan is not None:
        model_plan = plan
        attempt(lambda: validate_config(model_plan.config))
        attempt(lambda: validate_trainable(model_plan))
        attempt(lambda: training_configs(config, model_plan))
        attempt(lambda: validate_weights(config))
        if config.rollout.source == "recorded" and config.rollout.files:
            packing = plan.packing(config.prefix_group)
            recording = attempt(lambda: read_recording(config, model_plan, packing))
    sampling: Sampling | None = None
    if config.rollout.source != "recorded":
        if plan is not None:
            model_plan = plan
            attempt(lambda: routes_of_run(config, model_plan))
        most = None if plan is None else plan.max_positions
        sampling = attempt(lambda: open_sampling(config, most))
        if sampling is not None:
            task, reward = sampling.task, sampling.reward
            attempt(lambda: check_held_out(config.run, task, reward))
    raise_problems("would stop this run", problems)
    assert plan is not None
    sizes = ParallelSizes.from_config(config.parallel, world_size)
    dp_size = sizes.dp
    lines = [_layout_line(sizes)]
    plans: list[list[PackPlan]] | None = None
    if recording is not None:
        plans = _plan_first_step(config, plan, recording, dp_size)
        lines.append(_packing_line(config, recording, plans))
    if sampling is not None and isinstance(sampling.task, FilePrompts):
        lines.append(str(sampling.task))
    lines.append(
        f"layers on a machine like this one: {plan.layers} "
        f"(model.transformer_impl={config.model.transformer_impl})"
    )
    parameters = parameters_per_rank(plan)
    tokens = _resident_tokens(config, plans)
    resident = _resident_bytes(config, plan, tokens, plans)
    total = _bytes_per_rank(config, plan, parameters, dp_size) + resident
    dtype = str(plan.config.params_dtype).removeprefix("torch.")
    lines.append(
        f"largest rank: {parameters:,} parameters in {dtype}, about {total / 2**30:.2f} GiB"
    )
    if resident:
        lines.append(
            f"of it resident prompts: {'up to ' if plans is None else ''}{tokens:,} tokens at once "
            f"({config.prefix_group.prefix_resident_mode}), about {resident / 2**30:.2f} GiB"
        )
    return DryRun(tuple(lines), parameters, total, resident)


def _layout_line(s: ParallelSizes) -> str:
    return (
        f"{s.world_size} ranks: tp {s.tp}{' with sp' if s.sp else ''} x pp {s.pp} "
        f"(vpp {s.vpp or 1}) x dp {s.dp}"
    )


def _plan_first_step(
    config: TrainConfig, plan: ModelPlan, recording: Recording, dp_size: int
) -> list[list[PackPlan]]:
    """Waves of every data-parallel rank."""
    packing = plan.packing(config.prefix_group)
    groups = without_aborted(recording.groups[: config.run.groups_per_step])
    shapes = [group_shape(group, packing.min_shared) for group in groups]
    return plan_all_replicas(shapes, dp_size, packing)


def _packing_line(
    config: TrainConfig, recording: Recording, plans: Sequence[Sequence[PackPlan]]
) -> str:
    num_groups = min(config.run.groups_per_step, len(recording.groups))
    tokens = replace(sum(map(count_tokens, plans), TokenCounts()), waves=len(plans[0]))
    return (
        f"first {num_groups} of {len(recording.groups)} groups: {tokens.logical:,} logical "
        f"tokens, {tokens.unique:,} encoded (reuse {tokens.logical / max(tokens.unique, 1):.2f}x), "
        f"{sum(len(wave.rows) for wave in plans[0])} microbatches a rank"
        + (f", {tokens.split:,} tokens more for their routes" if tokens.split else "")
        + _resident_clause(tokens)
    )


def _resident_clause(tokens: TokenCounts) -> str:
    if not tokens.resident_groups:
        return ""
    return (
        f"; prompts of {tokens.resident_groups} groups ({tokens.resident:,} tokens) are resident, "
        f"in {tokens.waves} wave(s)"
    )


def parameters_per_rank(plan: ModelPlan) -> int:
    """Parameters of the largest rank: its layers, and the embedding and output it may hold."""
    config = plan.config
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    sizes = AttentionSizes.from_config(config)
    attention, whole = sizes.parameters(config.hidden_size), 2 * config.hidden_size
    if config.attention_output_gate:
        attention += config.hidden_size * sizes.num_heads * sizes.head_dim
    if config.softmax_type == "learnable":
        attention += sizes.num_heads
    if plan.use_te:
        # Transformer Engine's projections onto latents are on every rank.
        attention -= sizes.down_parameters(config.hidden_size)
        whole += sizes.down_parameters(config.hidden_size)
    if config.qk_layernorm and sizes.kv_lora_rank:
        whole += (sizes.q_lora_rank or 0) + sizes.kv_lora_rank
    matrices = 3 if config.gated_linear_unit else 2
    width = matrices * config.hidden_size
    dense = attention // tp + whole + width * config.ffn_hidden_size // tp
    # What a layer with experts has beyond, or short of, one without.
    more = 0
    if config.num_moe_experts:
        experts = config.num_moe_experts // config.expert_model_parallel_size
        expert = width * (config.moe_ffn_hidden_size or config.ffn_hidden_size)
        shared = width * (config.moe_shared_expert_intermediate_size or 0)
        more = config.num_moe_experts * config.hidden_size
        more += experts * expert // ParallelSizes.from_config(config).expert_tp
        more += (shared - width * config.ffn_hidden_size) // tp
    embedding = plan.gpt["vocab_size"] * config.hidden_size // tp
    tables = [0] * pp
    tables[0] += 1
    # A tied output keeps a copy of the embedding on a last stage of its own.
    tables[-1] += pp > 1 or not plan.gpt["share_embeddings_and_output_weights"]
    stages = zip(layers_per_stage(config), expert_layers_per_stage(config), tables)
    return max(int(n * dense + e * more + t * embedding) for n, e, t in stages)


def _bytes_per_rank(config: TrainConfig, plan: ModelPlan, parameters: int, dp_size: int) -> int:
    """Weights, fp32 gradients, Adam state and master weights, activations of microbatches."""
    width = plan.config.params_dtype.itemsize
    state = 8 + (4 if width < 4 else 0)
    shards = dp_size if config.parallel.use_distributed_optimizer else 1
    model = parameters * (width + max(width, 4)) + parameters * state // shards
    # 1F1B: the first stage holds one microbatch per stage, each with its share of the layers. As
    # many prefix rows, which are no longer, take their place while they are recomputed.
    rows = config.prefix_group.max_tokens_per_microbatch
    layers = plan.config.pipeline_model_parallel_size * max(layers_per_stage(plan.config))
    activations = rows * layers * _memory_model(plan).activations
    vocabulary = plan.gpt["vocab_size"] // plan.config.tensor_model_parallel_size
    head = config.prefix_group.logprob_chunk_tokens * vocabulary * 4 * 2
    algorithm = config.algorithm
    reference = parameters * width if algorithm.needs_reference else 0
    if algorithm.ref_offload or algorithm.precompute_ref_logprobs:
        # There only while no activations are kept.
        return int(model + max(activations, reference) + head)
    return int(model + reference + activations + head)


def _resident_tokens(config: TrainConfig, plans: Sequence[Sequence[PackPlan]] | None) -> int:
    """Largest number of prompt tokens that are resident at once; the bound without a plan."""
    if plans is not None:
        return max(wave.prefix_tokens for waves in plans for wave in waves)
    if config.prefix_group.prefix_resident == "never":
        return 0
    return config.prefix_group.max_resident_tokens or config.prefix_group.max_tokens_per_microbatch


def _resident_bytes(
    config: TrainConfig,
    plan: ModelPlan,
    tokens: int,
    plans: Sequence[Sequence[PackPlan]] | None,
) -> int:
    """What they keep on every pipeline stage beside its microbatches, by the average layer."""
    model, mode = plan.config, config.prefix_group.prefix_resident_mode
    memory = _memory_model(plan)
    # Latents are kept of whole prompts.
    windows = [None] if model.multi_latent_attention else layer_windows(model)
    layers = [memory.resident(mode, _kept_share(window, plans)) for window in windows]
    return int(tokens * max(layers_per_stage(model)) * sum(layers) / len(layers))


def _kept_share(window: int | None, plans: Sequence[Sequence[PackPlan]] | None) -> float:
    """Of the largest wave's resident tokens, those that a window reaches; all without a plan."""
    if window is None or plans is None:
        return 1.0
    wave = max((wave for waves in plans for wave in waves), key=lambda wave: wave.prefix_tokens)
    prefixes = [wave.shapes[group].prefixes for row in wave.prefix_rows for group in row]
    lens: list[int] = [n for prefix in prefixes for n in prefix.segment_lens.tolist()]
    return sum(min(length, window) for length in lens) / max(sum(lens), 1)


def _memory_model(plan: ModelPlan) -> MemoryModel:
    c, attention = plan.config, AttentionSizes.from_config(plan.config)
    return MemoryModel.from_model_dims(
        hidden_size=c.hidden_size,
        ffn_hidden_size=active_ffn_hidden_size(c),
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_kv_heads,
        kv_channels=attention.head_dim,
        value_channels=attention.value_dim,
        latent_channels=attention.latent_dim,
        kept_channels=attention.kept_dim(c.tensor_model_parallel_size, c.sequence_parallel),
        gated_linear_unit=c.gated_linear_unit,
        value_bytes=c.params_dtype.itemsize,
        tp_size=c.tensor_model_parallel_size,
        sequence_parallel=c.sequence_parallel,
        recompute_layers=c.recompute_granularity == "full",
    )
