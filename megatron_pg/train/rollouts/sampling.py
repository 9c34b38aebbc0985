"""Prompts, rewards and settings of sampling, checked before the model is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...rollout import (
    HoldsOut,
    PromptSource,
    ReasoningGymTask,
    RewardFunction,
    SamplingParams,
    load_callable,
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
    reward: RewardFunction
    params: SamplingParams


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
