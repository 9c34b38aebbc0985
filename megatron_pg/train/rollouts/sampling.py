"""Prompts, rewards and settings of sampling, checked before the model is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...rollout import (
    BatchedReward,
    FilePrompts,
    NamedRewards,
    PromptSource,
    ReasoningGymTask,
    RewardFunction,
    SamplingParams,
    load_callable,
    reward_settings,
)
from ..config import (
    RolloutConfig,
    TrainConfig,
)
from .positions import BoundedPrompts
from .tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Everything but the engine that rewarded responses are sampled with."""

    tokenizer: Any
    task: PromptSource
    reward: RewardFunction | BatchedReward
    params: SamplingParams


def open_sampling(config: TrainConfig, max_positions: int | None) -> Sampling:
    """Tokenizer, prompts, reward and sampling parameters of a run.

    Raises:
        ValueError: on a folder without tokenizer, an unknown task, malformed files, a reward that
            does not load or needs what prompts do not have, or a prompt that leaves no room for a
            response in ``max_positions`` (of a task: one of the first step).
    """
    tokenizer = load_tokenizer(config)
    task = make_prompts(config, tokenizer, max_positions)
    reward = _reward(config.rollout, task)
    if isinstance(reward, NamedRewards):
        reward.check(task.prompts(0, 1)[0])
    if max_positions is not None and not isinstance(task, FilePrompts):
        task = BoundedPrompts(task, max_positions, config.rollout.max_response_tokens)
        task.prompts(0, config.run.groups_per_step)
    params = sampling_params(config, tokenizer)
    return Sampling(tokenizer=tokenizer, task=task, reward=reward, params=params)


def make_prompts(config: TrainConfig, tokenizer: Any, max_positions: int | None) -> PromptSource:
    """The prompts of a run: those of files, or a task's."""
    if config.rollout.prompts.files:
        return _file_prompts(config, tokenizer, max_positions)
    return make_task(config.rollout, tokenizer)


def _file_prompts(config: TrainConfig, tokenizer: Any, max_positions: int | None) -> FilePrompts:
    rollout, settings = config.rollout, config.rollout.prompts
    most, limit = settings.max_prompt_tokens, "rollout.prompts.max_prompt_tokens"
    room = None if max_positions is None else max_positions - rollout.max_response_tokens
    if room is not None and (most is None or room < most):
        most = room
        limit = (
            f"max_position_embeddings={max_positions} of the model with "
            f"rollout.max_response_tokens={rollout.max_response_tokens}"
        )
    return FilePrompts(
        settings.files,
        val_files=settings.val_files,
        tokenizer=tokenizer,
        prompt_key=settings.prompt_key,
        answer_key=settings.answer_key,
        template=settings.template,
        system_prompt=settings.system_prompt,
        max_prompt_tokens=most,
        too_long=settings.too_long,
        limit=limit,
        shuffle=rollout.shuffle,
        seed=config.run.seed,
    )


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


def _reward(config: RolloutConfig, task: PromptSource) -> RewardFunction | BatchedReward:
    if config.reward is not None:
        return NamedRewards(reward_settings(config.reward))
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
