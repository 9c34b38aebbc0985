"""Where a run's groups come from, checked before the model is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import has_tokenizer
from ..data import (
    Group,
    carried_fields,
    group_shape,
    plan_waves,
    read_rollouts,
    without_aborted,
)
from ..rollout import (
    OpenAIServerSource,
    ReasoningGymTask,
    RecordedRollouts,
    RewardFunction,
    RolloutSource,
    SampledRollouts,
    SamplingParams,
    load_reward,
)
from .batch import PackingConfig
from .config import AlgorithmConfig, RolloutConfig, TrainConfig
from .config_checks import needs_reference_message, raise_problems
from .model_plan import ModelPlan
from .model_source import ModelSource
from .positions import BoundedTask, recorded_position_problems
from .ranks import Ranks
from .shared_stream import SharedStream, on_first_rank


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
    task: ReasoningGymTask
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

    fields = on_first_rank(read, ranks.rank == 0)
    return own[0] if own else Recording(groups=(), fields=fields)


def open_sampling(config: TrainConfig, max_positions: int | None) -> Sampling:
    """Tokenizer, task, reward and sampling parameters of a run.

    Raises:
        ValueError: on a folder without tokenizer, an unknown task, a reward that does not load, or
            a prompt of the first step that leaves no room for a response in ``max_positions``.
    """
    tokenizer = load_tokenizer(config)
    task = make_task(config.rollout, tokenizer, max_positions)
    if max_positions is not None:
        task.prompts(0, config.run.groups_per_step)
    reward = task if config.rollout.reward is None else load_reward(config.rollout.reward)
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
        return SharedStream(recorded, needs_all_ranks=False, is_first=is_first)
    if rollout.source == "model":
        own = ModelSource(chunks, inputs.tokenizer, vocab_size, rollout.max_batch_samples)
        stream = _sampled(inputs, own, vocab_size)
        return SharedStream(stream, needs_all_ranks=True, is_first=is_first)
    server = rollout.server
    source = OpenAIServerSource(
        server.base_url,
        model=server.model or None,
        tokenizer=inputs.tokenizer,
        vocab_size=vocab_size,
        dialect=server.dialect,
        allow_retokenize=server.allow_retokenize,
        max_concurrency=server.max_concurrency,
        timeout_seconds=server.timeout_seconds,
        health_path=server.health_path,
        api_key=server.api_key,
        reload=server.reload,
        export_dir=server.export_dir or str(Path(config.run.out) / "export"),
    )
    stream = _sampled(inputs, source, vocab_size)
    return SharedStream(stream, needs_all_ranks=False, is_first=is_first)


def _sampled(inputs: Sampling, source: RolloutSource, vocab_size: int) -> SampledRollouts:
    return SampledRollouts(inputs.task, source, inputs.reward, inputs.params, vocab_size=vocab_size)


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


def make_task(
    config: RolloutConfig, tokenizer: Any, max_positions: int | None = None
) -> ReasoningGymTask:
    """The prompts of a run, refused where a response would end beyond ``max_positions``."""
    task = config.task
    return BoundedTask(
        max_positions=max_positions,
        max_response_tokens=config.max_response_tokens,
        tokenizer=tokenizer,
        name=task.name,
        config=task.config,
        seed=task.seed,
        size=task.size,
        held_out_share=task.held_out_share,
        template=task.template,
        system_prompt=task.system_prompt,
        extractor=task.extractor,
        partial_credit=task.partial_credit,
    )


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
        f"{refusals[0]} (run.max_tokens_per_microbatch={packing.max_tokens}, "
        f"run.max_resident_tokens={packing.residency.max_resident_tokens}, "
        f"run.prefix_resident={packing.residency.choice}; {len(refusals)} of {len(groups)} groups "
        "do not fit)"
    ]
