"""The schema of recorded rollouts, one row per response; JSONL and parquet both follow it.

==================  =========  =====================================================================
field               required   value
==================  =========  =====================================================================
prompt_ids          ids form   token ids, at least one
response_ids        ids form   token ids; not needed of an aborted response, likewise ``response``
prompt              text form  string, or chat messages ``[{"role": ..., "content": ...}, ...]``
response            text form  string
reward              yes        finite number, or a boolean for 1 and 0; none is needed of an aborted
                               or empty response
group_id            no         string or integer, on every row of a file or on none; without it,
                               rows with equal prompts form a group
sample_id           no         string or integer, unique in its file except within a rollout
rollout_id          no         string or integer: rows of a group with equal ones are turns,
                               sub-agents and contexts of one rollout (see ``Sample``)
loss_weight         no         number above 0: how often the row counts among sequences, in place of
                               once for each rollout; as the logprobs
loss_mask           no         0 or 1 per response token; all 1 when absent
rollout_logprobs    no         number <= 0 per response token, likewise ``old_logprobs``,
                               ``ref_logprobs``; on all rows of a group that train a token, or none
advantage           no         number, or one number per response token; as the logprobs
routed_experts      no         experts of every token by layer (see ``route_forms``); as logprobs
status              no         completed (default), truncated, aborted
metadata            no         object, or a JSON string that holds one
==================  =========  =====================================================================

A null counts as absent. Per-token fields need the ids form: text tokenized anew may have other
tokens than those that the values belong to. A row whose ``status`` is aborted or whose response has
no tokens trains nothing, and its reward does not count (see ``Sample``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..route_forms import decode_routes
from ..types import Sample
from ..values import token_problem
from .fields import FIELDS, IDS_FORM, PER_TOKEN, TEXT_FORM
from .text import TextEncoder

# (field, what is wrong with it)
Errors = list[tuple[str, str]]
_NO_TOKENIZER = (
    "is text, and there is no tokenizer: pass tokenizer= (a run takes that of model.hf's folder, "
    "tools/plan_sharing.py --tokenizer)"
)


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A valid row: its sample, and what puts it into a group."""

    sample: Sample
    group_id: str | None
    prompt_key: bytes

    @property
    def first_token(self) -> bytes:
        """Equal for prompts that begin with one token."""
        return self.prompt_key[: np.dtype(np.int64).itemsize]


class RowParser:
    """Checks rows against the schema and turns them into samples.

    Args:
        encoder: tokenizes the text form; None refuses it.
        vocab_size: token ids must lie below; None checks only that they are plausible.
    """

    def __init__(self, encoder: TextEncoder | None, vocab_size: int | None) -> None:
        self._encoder = encoder
        self._vocab_size = vocab_size
        # Rows of a group share one tensor, which saves memory and makes comparisons cheap.
        self._prompts: dict[bytes, Tensor] = {}

    def parse(self, row: Mapping[str, Any]) -> ParsedRow | Errors:
        """The row as a sample, or everything that is wrong with it."""
        row = {name: value for name, value in row.items() if value is not None}
        if row.get("status") == "aborted":
            absent: dict[str, Any] = {"response": ""} if "prompt" in row else {"response_ids": []}
            row = absent | row
        errors = [(name, _unknown_field(name)) for name in row if name not in FIELDS]
        for name, check in FIELDS.items():
            if name in row and (wrong := check(row[name])):
                errors.append((name, wrong))
        errors += _form_errors(row, has_encoder=self._encoder is not None)
        if errors:
            return errors
        try:
            prompt_ids, response_ids = self._token_ids(row)
        except Exception as error:  # whatever a tokenizer or its template raises
            return [("prompt", f"could not be tokenized: {type(error).__name__}: {error}")]
        suffix = "_ids" if "prompt_ids" in row else ""
        if not prompt_ids:
            errors.append((f"prompt{suffix}", "has no tokens"))
        for name, ids in ((f"prompt{suffix}", prompt_ids), (f"response{suffix}", response_ids)):
            if wrong := token_problem(ids, self._vocab_size):
                errors.append((name, wrong))
        for name in PER_TOKEN:
            values = row.get(name)
            if isinstance(values, list) and len(values) != len(response_ids):
                message = f"has {len(values)} values, the response has {len(response_ids)} tokens"
                errors.append((name, message))
        routes = None
        if "routed_experts" in row:
            try:
                num_tokens = len(prompt_ids) + len(response_ids)
                routes = decode_routes(row["routed_experts"], num_tokens=num_tokens)
            except ValueError as error:
                errors.append(("routed_experts", str(error)))
        return errors or self._build(row, prompt_ids, response_ids, routes)

    def _token_ids(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        if "prompt_ids" in row:
            return row["prompt_ids"], row["response_ids"]
        assert self._encoder is not None, "_form_errors refuses text without an encoder"
        is_completed = row.get("status", "completed") == "completed"
        prompt_ids = self._encoder.encode_prompt(row["prompt"])
        return prompt_ids, self._encoder.encode_response(row["response"], is_completed)

    def _build(
        self,
        row: Mapping[str, Any],
        prompt_ids: list[int],
        response_ids: list[int],
        routes: Tensor | None,
    ) -> ParsedRow:
        prompt = np.array(prompt_ids, dtype=np.int64)
        key = prompt.tobytes()
        shared_prompt = self._prompts.setdefault(key, torch.from_numpy(prompt))
        num_tokens = len(response_ids)
        advantage = row.get("advantage")
        if isinstance(advantage, int | float):
            advantage = [advantage] * num_tokens
        mask = row.get("loss_mask", [True] * num_tokens)
        metadata = row.get("metadata", {})
        sample = Sample(
            prompt_ids=shared_prompt,
            response_ids=torch.from_numpy(np.array(response_ids, dtype=np.int64)),
            reward=float(row.get("reward", 0.0)),
            loss_mask=torch.from_numpy(np.array(mask, dtype=bool)),
            rollout_logprobs=_as_float64(row.get("rollout_logprobs")),
            old_logprobs=_as_float64(row.get("old_logprobs")),
            ref_logprobs=_as_float64(row.get("ref_logprobs")),
            advantages=_as_float64(advantage),
            routed_experts=routes,
            status=row.get("status", "completed"),
            sample_id=_as_id(row.get("sample_id")),
            rollout_id=_as_id(row.get("rollout_id")),
            loss_weight=row.get("loss_weight"),
            metadata=json.loads(metadata) if isinstance(metadata, str) else metadata,
        )
        return ParsedRow(sample, _as_id(row.get("group_id")), key)


def _form_errors(row: Mapping[str, Any], *, has_encoder: bool) -> Errors:
    """What keeps the row from being in one complete form, ids or text."""
    is_empty = row.get("response_ids", row.get("response")) in ([], "")
    needs_reward = not is_empty and row.get("status") != "aborted"
    errors = (
        [("reward", "is missing or null; score the row or leave it out")]
        if needs_reward and "reward" not in row
        else []
    )
    has_text = [name for name in TEXT_FORM if name in row]
    if has_text and any(name in row for name in IDS_FORM):
        message = "stands beside token ids, which are exact; keep the ids, put text into 'metadata'"
        return [*errors, (has_text[0], message)]
    form = TEXT_FORM if has_text else IDS_FORM
    errors += [(name, "is missing") for name in form if name not in row]
    if has_text:
        if not has_encoder:
            errors.append((has_text[0], _NO_TOKENIZER))
        message = "belongs to tokens that text does not determine; give prompt_ids and response_ids"
        lists = [name for name in PER_TOKEN if isinstance(row.get(name), list)]
        lists += [name for name in ("routed_experts",) if name in row]
        errors += [(name, message) for name in lists]
    return errors


# What other programs call a field.
_OTHER_NAMES = {
    **dict.fromkeys(("execution_id", "trajectory_id"), "rollout_id"),
    "uid": "group_id",
    **dict.fromkeys(("output_ids", "completion_ids"), "response_ids"),
    **dict.fromkeys(("output", "completion"), "response"),
    "response_mask": "loss_mask",
    "score": "reward",
}
# What others' names leave open, so that the name nearest in letters may be the wrong one.
_OPEN_NAMES = {
    **dict.fromkeys(
        ("logprobs", "log_probs"),
        "say whose: 'rollout_logprobs' are the engine's that sampled, 'old_logprobs' those of the "
        "policy before the update, 'ref_logprobs' the reference model's",
    ),
    **dict.fromkeys(
        ("input_ids", "tokens"),
        "say where the response begins: give 'prompt_ids' and 'response_ids'",
    ),
}


def _unknown_field(name: str) -> str:
    if name in _OTHER_NAMES:
        return f"is no field of the schema; its name here is {_OTHER_NAMES[name]!r}"
    if name in _OPEN_NAMES:
        return f"is no field of the schema; {_OPEN_NAMES[name]}"
    close = get_close_matches(name, FIELDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "put it under 'metadata'"
    return f"is no field of the schema; {hint}"


def _as_id(value: int | str | None) -> str | None:
    return None if value is None else str(value)


def _as_float64(values: list[float] | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(np.array(values, dtype=np.float64))
