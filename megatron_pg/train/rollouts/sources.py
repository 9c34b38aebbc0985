"""Where a run's groups come from, checked before the model is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint import has_tokenizer
from ...data import (
    Group,
    carried_fields,
    group_shape,
    plan_waves,
    read_rollouts,
    without_aborted,
)
from ...grpo import PackingConfig, Ranks
from ...parallel import on_first_rank
from ...rollout import (
    HoldsOut,
    OpenAIServerSource,
    PromptSource,
    ReasoningGymTask,
    RecordedRollouts,
    RewardFunction,
    RolloutSource,
    SampledRollouts,
    SamplingParams,
    load_callable,
)
from ..config import (
    AlgorithmConfig,
    RolloutConfig,
    TrainConfig,
    needs_reference_message,
    raise_problems,
)
from ..model import ModelPlan
from .model_source import ModelSource
from .positions import BoundedPrompts, recorded_position_problems
from .shared_stream import SharedStream


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Recorded groups that fit the run.

    Attributes:
        groups: all of them on the first rank, none on the others.
        fields: optional per-token values that every sample carries (see ``carried_fields``).
    """

    groups: Sequence[Group]
    fields: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Everything but the engine that rewarded responses are sampled with."""

    tokenizer: Any
    task: PromptSource
    reward: RewardFunction
    params: SamplingParams


def read_recording(config: TrainConfig, plan: ModelPlan, packing: PackingConfig) -> Recording:
    """Read all recorded groups and check them against the run.

    Raises:
        ValueError: naming file, row and field of everything that is malformed, or everything
            that keeps the groups from being trained as configured.
    """
    rollout = config.rollout
    hf = config.model.hf
    # Recorded token ids need no tokenizer; rows of text are refused without one.
    tokenizer = load_tokenizer(config) if hf is not None and has_tokenizer(Path(hf)) else None
    groups = read_rollouts(
        rollout.files,
        format=rollout.format,
        tokenizer=tokenizer,
        vocab_size=plan.vocab_size,
        reward_key=rollout.reward_key,
        group_across_files=rollout.group_across_files,
    )
    recording = Recording(groups=groups, fields=carried_fields(groups))
    problems = _recording_problems(config, recording, packing)
    problems += recorded_position_problems(groups, plan.max_positions)
    raise_problems("of the recorded rollouts", problems)
    return recording


def share_recording(
    config: TrainConfig, plan: ModelPlan, packing: PackingConfig, ranks: Ranks
) -> Recording:
    """``read_recording`` on the first rank; a refusal there is raised on every rank."""
    own: list[Recording] = []

    def read() -> tuple[str, ...]:
        own.append(read_recording(config, plan, packing))
        return own[0].fields

    fields = on_first_rank(read)
    return own[0] if own else Recording(groups=(), fields=fields)


def open_sampling(config: TrainConfig, max_positions: int | None) -> Sampling:
    """Tokenizer, task, reward and sampling parameters of a run.

    Raises:
        ValueError: on a folder without tokenizer, an unknown task, a reward that does not load, a
            task that holds nothing out where an evaluation needs it, or a prompt of the first step
            that leaves no room for a response in ``max_positions``.
    """
    tokenizer = load_tokenizer(config)
    task = make_task(config.rollout, tokenizer)
    reward = _reward(config.rollout, task)
    if config.run.eval_prompts and not isinstance(task, HoldsOut):
        raise ValueError(
            f"run.eval_prompts={config.run.eval_prompts}, but rollout.task.name="
            f"{config.rollout.task.name} has no held_out(), which gives the prompts that training "
            "never sees; give it one, or set run.eval_prompts to 0"
        )
    if max_positions is not None:
        task = BoundedPrompts(task, max_positions, config.rollout.max_response_tokens)
        task.prompts(0, config.run.groups_per_step)
    params = sampling_params(config, tokenizer)
    return Sampling(tokenizer=tokenizer, task=task, reward=reward, params=params)


def make_stream(
    config: TrainConfig,
    inputs: Recording | Sampling,
    chunks: Sequence[Any],
    vocab_size: int,
    ranks: Ranks,
) -> SharedStream:
    """The stream that a config describes."""
    rollout, is_first = config.rollout, ranks.rank == 0
    if isinstance(inputs, Recording):
        recorded = None
        if is_first:
            recorded = RecordedRollouts(
                inputs.groups, shuffle=rollout.shuffle, seed=config.run.seed
            )
        return SharedStream(recorded, is_first=is_first)
    source = _make_source(config, inputs.tokenizer, chunks, vocab_size, ranks)
    sampled = SampledRollouts(
        inputs.task, source, inputs.reward, inputs.params, vocab_size=vocab_size
    )
    return SharedStream(sampled, is_first=is_first)


def _make_source(
    config: TrainConfig, tokenizer: Any, chunks: Sequence[Any], vocab_size: int, ranks: Ranks
) -> RolloutSource:
    rollout, server = config.rollout, config.rollout.server
    if rollout.source == "model":
        return ModelSource(chunks, tokenizer, vocab_size, rollout.max_batch_samples, ranks)
    if rollout.source != "server":
        make = load_callable("rollout.source", rollout.source)
        source = make(tokenizer=tokenizer, vocab_size=vocab_size, **rollout.source_config)
        if not isinstance(source, RolloutSource):
            raise ValueError(
                f"rollout.source={rollout.source} made a {type(source).__name__}; make a subclass "
                "of megatron_pg.rollout.RolloutSource"
            )
        return source
    return OpenAIServerSource(
        server.base_url,
        model=server.model or None,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        dialect=server.dialect,
        allow_retokenize=server.allow_retokenize,
        max_concurrency=server.max_concurrency,
        timeout_seconds=server.timeout_seconds,
        health_path=server.health_path,
        api_key=server.api_key,
        reload=server.reload,
        export_dir=server.export_dir or str(Path(config.run.out) / "export"),
        on_first=on_first_rank,
    )


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of ``model.hf``. Raises ValueError when the folder has none."""
    if config.model.hf is None:
        raise ValueError(
            f"rollout.source={config.rollout.source} needs a tokenizer: set model.hf to a Hugging "
            "Face folder, or train from recorded token ids"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.model.hf)
    except (OSError, ValueError) as error:
        raise ValueError(f"{config.model.hf} has no usable tokenizer: {error}") from error


def make_task(config: RolloutConfig, tokenizer: Any) -> PromptSource:
    """The prompts of a run: a reasoning-gym task, or a ``PromptSource`` of one's own."""
    task = config.task
    if ":" in task.name:
        made = load_callable("rollout.task.name", task.name)(
            tokenizer=tokenizer, **(task.config or {})
        )
        if not isinstance(made, PromptSource):
            raise ValueError(
                f"rollout.task.name={task.name} made a {type(made).__name__} without "
                "prompts(start, count); see megatron_pg.rollout.PromptSource"
            )
        return made
    return ReasoningGymTask(
        tokenizer=tokenizer,
        name=task.name,
        config=task.config or {},
        seed=task.seed,
        size=task.size,
        held_out_share=task.held_out_share,
        template=task.template,
        system_prompt=task.system_prompt,
        extractor=task.extractor,
        partial_credit=task.partial_credit,
    )


def _reward(config: RolloutConfig, task: PromptSource) -> RewardFunction:
    if config.reward is not None:
        reward: RewardFunction = load_callable("rollout.reward", config.reward)
        return reward
    if not callable(task):
        raise ValueError(
            f"rollout.task.name={config.task.name} judges no responses: set rollout.reward, or "
            "give the task a __call__(prompt, response)"
        )
    return task


def sampling_params(config: TrainConfig, tokenizer: Any) -> SamplingParams:
    """How responses are sampled; the tokenizer's end token stops them.

    A server knows its model's end token, and a plain completions server takes no other.
    """
    rollout = config.rollout
    stops = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    if rollout.source == "server":
        stops = ()
    return SamplingParams(
        num_generations=rollout.num_generations,
        max_response_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k or None,
        top_p=rollout.top_p,
        stop_token_ids=stops,
        seed=config.run.seed,
    )


# Settings of how advantages come from rewards.
_OF_REWARDS = (
    "adv_estimator",
    "norm_adv_by_std_in_grpo",
    "std_floor",
    "skip_groups_without_spread",
    "use_kl_in_reward",
    "overlong_buffer_len",
)


def _recording_problems(
    config: TrainConfig, recording: Recording, packing: PackingConfig
) -> list[str]:
    algorithm, fields = config.algorithm, recording.fields
    problems = []
    if algorithm.policy.importance_mode is not None and "rollout_logprobs" not in fields:
        problems.append(
            f"algorithm.policy.importance_mode={algorithm.policy.importance_mode!r} needs "
            "rollout_logprobs on every row; record them, or set it to null"
        )
    has_reference = algorithm.ref_hf or config.model.hf or "ref_logprobs" in fields
    if algorithm.needs_reference and not has_reference:
        problems.append(needs_reference_message())
    if "advantages" in fields:
        for name in _OF_REWARDS:
            if getattr(algorithm, name) != getattr(AlgorithmConfig, name):
                problems.append(
                    f"algorithm.{name}={getattr(algorithm, name)!r} concerns rewards, but the rows "
                    "carry advantages, which are used instead; leave out the one or the other"
                )
    if not any(s.num_loss_tokens for group in recording.groups for s in group.samples):
        problems.append(
            "no row has a trained token: every response is aborted or empty, or its loss_mask is 0 "
            "throughout"
        )
    problems += _execution_problems(recording.groups, algorithm)
    return problems + _length_problems(recording.groups, packing)


def _execution_problems(groups: Sequence[Group], algorithm: AlgorithmConfig) -> Iterator[str]:
    """Rewards shaped by a sample's own length or KL would differ within an execution."""
    split = next((g for g in groups if len(g.executions.unique()) < len(g.samples)), None)
    for name in ("use_kl_in_reward", "overlong_buffer_len"):
        if split is not None and (value := getattr(algorithm, name)):
            yield (
                f"algorithm.{name}={value!r} changes the reward of every sample, but group "
                f"{split.group_id!r} has executions of several samples, which share one reward; "
                "turn it off, or leave execution_id (slime: rollout_id) out"
            )


def _length_problems(groups: Sequence[Group], packing: PackingConfig) -> list[str]:
    """The first group that fits in no way, and how many there are."""
    refusals = []
    for group in without_aborted(groups):
        shape = group_shape(group, packing.min_shared)
        try:
            plan_waves(
                [shape],
                packing.max_tokens,
                packing.residency,
                cost_model=packing.cost_model,
                pad_to_multiple=packing.pad_to_multiple,
            )
        except ValueError as error:
            refusals.append(str(error))
    if not refusals:
        return []
    return [
        f"{refusals[0]} (prefix_group.max_tokens_per_microbatch={packing.max_tokens}, "
        f"prefix_group.max_resident_tokens={packing.residency.max_resident_tokens}, "
        f"prefix_group.prefix_resident={packing.residency.choice}; {len(refusals)} of "
        f"{len(groups)} groups do not fit)"
    ]
