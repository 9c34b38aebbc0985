"""What requests to inference servers look like and how their answers are read.

Four answers to "which tokens were sampled", from exact to lossy:

* ``token_ids``: ``/v1/completions`` with ``return_token_ids`` (vLLM, and SGLang since it took the
  field over), or token strings ``token_id:17`` under ``return_tokens_as_token_ids`` (older vLLM).
  Fields as in vLLM's "OpenAI-Compatible Server" documentation, "Extra parameters".
* ``sglang``: SGLang's own ``/generate``, whose ``meta_info.output_token_logprobs`` pairs every
  sampled token with its logprob (SGLang's "Native APIs" and "Sampling Parameters" documentation).
* ``text``: plain ``/v1/completions`` (llama-cpp-python, transformers serve); the text is tokenized
  again, which need not give the sampled tokens back, and logprobs are left out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..data import Status
from .base import Prompt, Response, SamplingParams, Tokenizer

Dialect = Literal["token_ids", "sglang", "text"]

PATHS: Mapping[Dialect, str] = {
    "token_ids": "/v1/completions",
    "sglang": "/generate",
    "text": "/v1/completions",
}
_TOKEN_ID_PREFIX = "token_id:"
_STATUS: Mapping[str, Status] = {"stop": "completed", "length": "truncated", "abort": "aborted"}


def dialect_problem(
    dialect: Dialect, top_k: int | None, stop_token_ids: Sequence[int] = ()
) -> str | None:
    """What of these sampling parameters the dialect cannot express; None if it can all."""
    if dialect != "text" or (top_k is None and not stop_token_ids):
        return None
    return (
        "top_k and stop_token_ids are no part of the plain completions API; leave them out, or "
        "serve with vLLM or SGLang"
    )


class MalformedAnswerError(ValueError):
    """A server's answer does not have the form of its dialect."""


@dataclass(frozen=True)
class RawResponse:
    """One choice of an answer; ``token_ids`` is None where the server did not tell."""

    token_ids: list[int] | None
    logprobs: list[float] | None
    text: str
    finish_reason: str


def make_request(
    dialect: Dialect,
    prompt: Prompt,
    params: SamplingParams,
    *,
    model: str,
    tokenizer: Tokenizer | None = None,
    first_generation: int = 0,
) -> dict[str, Any]:
    """JSON body that samples ``params.num_generations`` responses of one prompt.

    Args:
        dialect: form of the request.
        prompt: sent as token ids, except in ``text``.
        params: all of it is sent, so that no default of the server or the model folder applies.
        model: served name; unused by ``sglang``.
        tokenizer: decodes the prompt in ``text``.
        first_generation: number of the first response, which the seed depends on.

    Raises:
        ValueError: if ``params`` has what plain servers do not understand, in ``text``.
    """
    seed = _request_seed(params.seed, prompt.prompt_id, first_generation)
    if dialect == "sglang":
        return {
            "input_ids": prompt.prompt_ids.tolist(),
            "return_logprob": True,
            "sampling_params": _drop_none(
                n=params.num_generations,
                max_new_tokens=params.max_response_tokens,
                sampling_seed=seed,
                **_extended_fields(params),
            ),
        }
    body = _drop_none(
        model=model,
        n=params.num_generations,
        max_tokens=params.max_response_tokens,
        seed=seed,
        temperature=params.temperature,
        top_p=params.top_p,
    )
    if dialect == "text":
        if problem := dialect_problem(dialect, params.top_k, params.stop_token_ids):
            raise ValueError(problem)
        assert tokenizer is not None
        return {**body, "prompt": tokenizer.decode(prompt.prompt_ids.tolist())}
    return {
        **body,
        **_extended_fields(params),
        "prompt": prompt.prompt_ids.tolist(),
        # 1, not 0: some servers take 0 for "none". The sampled token's logprob comes either way.
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def read_answer(dialect: Dialect, answer: Any) -> list[RawResponse]:
    """The responses in a server's answer, in the server's order.

    Raises:
        MalformedAnswerError: if a field is missing or has another type, or tokens and logprobs
            differ in number.
    """
    try:
        if dialect == "sglang":
            choices = answer if isinstance(answer, list) else [answer]
            raw = [_read_sglang(choice) for choice in choices]
        else:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            raw = [_read_choice(choice, with_tokens=dialect == "token_ids") for choice in choices]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MalformedAnswerError(
            f"answer has not the form of {PATHS[dialect]} ({type(error).__name__}: {error}): "
            f"{str(answer)[:300]}"
        ) from error
    for one in raw:
        if (
            one.token_ids is not None
            and one.logprobs is not None
            and len(one.token_ids) != len(one.logprobs)
        ):
            raise MalformedAnswerError(
                f"{len(one.logprobs)} logprobs for {len(one.token_ids)} tokens"
            )
    return raw


def make_response(
    raw: RawResponse, end_token_id: int | None, tokenizer: Tokenizer | None, version: int
) -> Response:
    """A response from what the server sent.

    A response without tokens cannot be trained on; it becomes one untrained end token with status
    ``aborted``, so that its group stays whole.

    Args:
        raw: choice of an answer.
        end_token_id: what a completed text ends with; needed without token ids.
        tokenizer: tokenizes the text where the server sent no token ids.
        version: of the weights, kept in ``metadata["weight_version"]``.

    Raises:
        ValueError: if an end token is needed and none is known.
    """
    metadata: dict[str, Any] = {"weight_version": version, "finish_reason": raw.finish_reason}
    status = _STATUS.get(raw.finish_reason, "aborted")
    token_ids = raw.token_ids
    if token_ids is None:
        assert tokenizer is not None
        metadata["retokenized"] = True
        token_ids = tokenizer.encode(raw.text, add_special_tokens=False)
        if status == "completed":
            token_ids.append(_known(end_token_id))
    is_empty = not token_ids
    ids = torch.tensor([_known(end_token_id)] if is_empty else token_ids, dtype=torch.int64)
    logprobs = None
    if raw.logprobs is not None and raw.token_ids is not None and not is_empty:
        logprobs = torch.tensor(raw.logprobs, dtype=torch.float64)
    return Response(
        response_ids=ids,
        text=raw.text,
        rollout_logprobs=logprobs,
        loss_mask=torch.zeros_like(ids, dtype=torch.bool) if is_empty else None,
        status="aborted" if is_empty else status,
        metadata=metadata,
    )


def _extended_fields(params: SamplingParams) -> dict[str, Any]:
    """Sampling fields that vLLM and SGLang add to the OpenAI API."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": -1 if params.top_k is None else params.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(params.stop_token_ids),
    }


def _read_choice(choice: Mapping[str, Any], with_tokens: bool) -> RawResponse:
    token_ids, logprobs = None, None
    table = choice.get("logprobs")
    if with_tokens:
        token_ids = choice.get("token_ids")
        if token_ids is None and table is not None:
            token_ids = _ids_from_strings(table["tokens"])
        if table is not None:
            logprobs = _finite(table["token_logprobs"])
    reason = choice["finish_reason"]
    return RawResponse(
        None if token_ids is None else [int(token) for token in token_ids],
        logprobs,
        str(choice["text"]),
        str(reason),
    )


def _read_sglang(choice: Mapping[str, Any]) -> RawResponse:
    meta = choice["meta_info"]
    # The pairs hold the end token too, which output_ids may lack.
    pairs = meta["output_token_logprobs"]
    return RawResponse(
        [int(pair[1]) for pair in pairs],
        _finite([pair[0] for pair in pairs]),
        str(choice["text"]),
        str(meta["finish_reason"]["type"]),
    )


def _ids_from_strings(tokens: Sequence[str]) -> list[int] | None:
    if not all(token.startswith(_TOKEN_ID_PREFIX) for token in tokens):
        return None
    return [int(token.removeprefix(_TOKEN_ID_PREFIX)) for token in tokens]


def _finite(logprobs: Sequence[float]) -> list[float]:
    values = [float(value) for value in logprobs]
    if not all(math.isfinite(value) for value in values):
        raise ValueError("a sampled token's logprob is not finite")
    return values


def _request_seed(seed: int | None, prompt_id: str, generation: int) -> int | None:
    """Seed of one request: prompts and generations must not share their random numbers."""
    if seed is None:
        return None
    return zlib.crc32(f"{seed}/{prompt_id}/{generation}".encode()) & 0x7FFFFFFF


def _known(end_token_id: int | None) -> int:
    if end_token_id is None:
        raise ValueError(
            "the server sent a response without token ids and no end token is known; "
            "pass a tokenizer with an eos_token_id"
        )
    return end_token_id


def _drop_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
