"""What every field of a recorded row may hold; ``schema`` says what the fields mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from ..json_text import parse_json_text
from ..types import Status
from ..values import (
    logprob_problem,
    number_problem,
    numbers_problem,
    reward_problem,
    show,
    token_problem,
    weight_problem,
)
from .text import check_prompt


def _check_prompt_ids(value: Any) -> str | None:
    return "has no tokens" if value == [] else _check_tokens(value)


def _check_tokens(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"must be a list of token ids, got {show(value)}"
    return token_problem(value, None)


def _check_mask(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"must be a list of 0 and 1, got {show(value)}"
    if set(map(type, value)) <= {int, bool} and set(value) <= {0, 1}:
        return None
    for i, flag in enumerate(value):
        if type(flag) not in (int, bool) or flag not in (0, 1):
            return f"value {i} is {show(flag)}, must be 0 or 1"
    return None


def _check_numbers(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"must be a list of numbers, got {show(value)}"
    return numbers_problem(value)


def _check_logprobs(value: Any) -> str | None:
    return logprob_problem(value) if isinstance(value, list) else _check_numbers(value)


def _check_advantage(value: Any) -> str | None:
    return _check_numbers(value) if isinstance(value, list) else number_problem(value)


def _check_id(value: Any) -> str | None:
    if (type(value) is int and abs(value) < 2**63) or (isinstance(value, str) and value):
        return None
    return f"must be a non-empty string or an integer, got {show(value)}"


def _check_text(value: Any) -> str | None:
    return None if isinstance(value, str) else f"must be a string, got {show(value)}"


def _check_status(value: Any) -> str | None:
    if value in get_args(Status):
        return None
    return f"is {show(value)}, must be one of {', '.join(get_args(Status))}"


def _check_metadata(value: Any) -> str | None:
    if isinstance(value, str):
        try:
            value = parse_json_text(value)
        except ValueError as error:
            return f"is the string {show(value)}, which is no JSON object: {error}"
    return None if isinstance(value, dict) else f"must be an object, got {show(value)}"


FIELDS: dict[str, Callable[[Any], str | None]] = {
    "prompt_ids": _check_prompt_ids,
    "response_ids": _check_tokens,
    "prompt": check_prompt,
    "response": _check_text,
    "reward": reward_problem,
    "group_id": _check_id,
    "sample_id": _check_id,
    "rollout_id": _check_id,
    "loss_weight": weight_problem,
    "loss_mask": _check_mask,
    "rollout_logprobs": _check_logprobs,
    "old_logprobs": _check_logprobs,
    "ref_logprobs": _check_logprobs,
    "advantage": _check_advantage,
    # Looked at when it is clear how many tokens there are.
    "routed_experts": lambda value: None,
    "status": _check_status,
    "metadata": _check_metadata,
}
IDS_FORM = ("prompt_ids", "response_ids")
TEXT_FORM = ("prompt", "response")
PER_TOKEN = ("loss_mask", "rollout_logprobs", "old_logprobs", "ref_logprobs", "advantage")
