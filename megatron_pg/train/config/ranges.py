"""Ranges of the numbers in a configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from .sections import TrainConfig

# key -> smallest value
_AT_LEAST: dict[str, float] = {
    "model.vocab_size": 1,
    "model.max_position_embeddings": 1,
    "model.make_vocab_size_divisible_by": 1,
    "prefix_group.min_shared": 1,
    "prefix_group.max_tokens_per_microbatch": 1,
    "prefix_group.max_resident_tokens": 1,
    "prefix_group.logprob_chunk_tokens": 1,
    "optimizer.lr": 0,
    "optimizer.min_lr": 0,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.weight_decay": 0,
    "optimizer.adam_beta1": 0,
    "optimizer.adam_beta2": 0,
    "optimizer.clip_grad": 0,
    "rollout.num_generations": 1,
    "rollout.max_response_tokens": 1,
    "rollout.top_k": 0,
    "rollout.max_batch_samples": 1,
    "rollout.prompts.max_prompt_tokens": 1,
    "rollout.task.size": 1,
    "rollout.server.max_concurrency": 1,
    "algorithm.std_floor": 0,
    "algorithm.ppo_epochs": 1,
    "algorithm.num_minibatches": 1,
    "algorithm.kl_coef": 0,
    "algorithm.overlong_buffer_len": 0,
    "algorithm.overlong_penalty_factor": 0,
    "algorithm.filter_groups.max_num_gen_batches": 1,
    "run.num_steps": 1,
    "run.groups_per_step": 1,
    "run.seed": 0,
    "run.save_interval": 0,
    "run.keep_checkpoints": 1,
    "run.eval_prompts": 0,
    "run.eval_generations": 1,
    "run.eval_interval": 0,
    "run.self_check_interval": 0,
    "run.self_check_groups": 1,
    "run.log_generations_interval": 0,
    "run.log_generations": 0,
}
_ABOVE_ZERO = (
    "model.rotary_base",
    "parallel.distributed_timeout_minutes",
    "optimizer.adam_eps",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.server.timeout_seconds",
    "algorithm.loss_scale_factor",
)
_BELOW_ONE = ("optimizer.adam_beta1", "optimizer.adam_beta2")
_AT_MOST_ONE = {"rollout.top_p": ", which turns it off"}
# A float holds every integer up to here; seeds are added to, and torch takes 64 bits of them.
_MOST = 2**53
# key -> smallest and largest value
_BETWEEN = {"rollout.task.held_out_share": (0.01, 0.99)}


def range_of(path: str) -> str:
    """The range of the number at ``section.key``, in words; empty where it has none."""
    if path in _BETWEEN:
        return "in [{}, {}]".format(*_BETWEEN[path])
    rules = [f"at least {_AT_LEAST[path]:g}"] if path in _AT_LEAST else []
    rules += ["above 0"] * (path in _ABOVE_ZERO) + ["below 1"] * (path in _BELOW_ONE)
    return ", ".join(rules + ["at most 1"] * (path in _AT_MOST_ONE))


def out_of_range(config: TrainConfig) -> Iterator[str]:
    """Every number of a configuration that lies outside its range."""
    large = [path for path in _numbers(config, int) if _value(config, path) > _MOST]
    yield from (f"{path} must be at most 2**53 ({_MOST})" for path in large)
    for path in (*_AT_LEAST, *_ABOVE_ZERO):
        value = _value(config, path)
        if value is None or isinstance(value, str) or path in large:
            # Some have a word for no number.
            continue
        if path in _ABOVE_ZERO:
            wrong, rule = not value > 0, "above 0"
        else:
            wrong, rule = value < _AT_LEAST[path], f"at least {_AT_LEAST[path]:g}"
        infinite = isinstance(value, float) and not math.isfinite(value)
        if wrong or infinite:
            yield f"{path}={value!r} must be {'finite and ' * infinite}{rule}"
    for path in _numbers(config, float):
        told = (*_AT_LEAST, *_ABOVE_ZERO, *_BETWEEN)
        if path not in told and not math.isfinite(_value(config, path)):
            yield f"{path}={_value(config, path)!r} must be finite"
    for path in _BELOW_ONE:
        if _value(config, path) >= 1:
            yield f"{path}={_value(config, path)!r} must be below 1"
    for path, (low, high) in _BETWEEN.items():
        if not low <= _value(config, path) <= high:
            yield f"{path}={_value(config, path)!r} must lie in [{low}, {high}]"
    for path, meaning in _AT_MOST_ONE.items():
        if _value(config, path) > 1:
            yield f"{path}={_value(config, path)!r} must be at most 1{meaning}"


def _numbers(section: Any, kind: type, prefix: str = "") -> Iterator[str]:
    """Every key whose value is of a kind, int or float."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, kind, f"{prefix}{field.name}.")
        elif type(value) is kind:
            yield f"{prefix}{field.name}"


def _value(config: TrainConfig, path: str) -> float:
    value = config
    for name in path.split("."):
        value = getattr(value, name)
    return value  # type: ignore[return-value]
