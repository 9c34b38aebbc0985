"""What requests to inference servers look like.

Four answers to "which tokens were sampled", from exact to lossy:

* ``token_ids``: ``/v1/completions`` with ``return_token_ids`` (vLLM, and SGLang since it took the
  field over), or token strings ``token_id:17`` under ``return_tokens_as_token_ids`` (older vLLM).
  Fields as in vLLM's "OpenAI-Compatible Server" documentation, "Extra parameters".
* ``sglang``: SGLang's own ``/generate``, whose ``meta_info.output_token_logprobs`` pairs every
  sampled token with its logprob (SGLang's "Native APIs" and "Sampling Parameters" documentation).
* ``text``: plain ``/v1/completions`` (llama-cpp-python, transformers serve); the text is tokenized
  again, which need not give the sampled tokens back, and logprobs are left out.

The experts of every token, where they are asked for, come per choice from servers that were started
with ``--enable-return-routed-experts`` (vLLM from 0.22, SGLang), in the first two.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..data import RouteShape
from .base import Tokenizer
from .values import Prompt, SamplingParams

Dialect = Literal["token_ids", "sglang", "text"]

PATHS: Mapping[Dialect, str] = {
    "token_ids": "/v1/completions",
    "sglang": "/generate",
    "text": "/v1/completions",
}
# Of an answer, per token asked for, the prompt's included: an id, a logprob, their names as text.
_BYTES_PER_TOKEN = 1 << 10
# Of an expert that a token went to: an int32 in base64, and some.
_BYTES_PER_EXPERT = 6


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


def make_request(
    dialect: Dialect,
    prompt: Prompt,
    params: SamplingParams,
    *,
    model: str,
    tokenizer: Tokenizer | None = None,
    first_generation: int = 0,
    with_routes: bool = False,
) -> dict[str, Any]:
    """JSON body that samples ``params.num_generations`` responses of one prompt.

    Args:
        dialect: form of the request.
        prompt: sent as token ids, except in ``text``.
        params: all of it is sent, so that no default of the server or the model folder applies.
        model: served name; unused by ``sglang``.
        tokenizer: decodes the prompt in ``text``.
        first_generation: number of the first response, which the seed depends on.
        with_routes: ask for the experts of every token; vLLM sends them unasked.

    Raises:
        ValueError: if ``params`` has what plain servers do not understand, in ``text``.
    """
    seed = _request_seed(params.seed, prompt.prompt_id, first_generation)
    routes = {"return_routed_experts": True} if with_routes else {}
    if dialect == "sglang":
        return {
            "input_ids": prompt.prompt_ids.tolist(),
            "return_logprob": True,
            **routes,
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
        **routes,
        "prompt": prompt.prompt_ids.tolist(),
        # 1, not 0: some servers take 0 for "none". The sampled token's logprob comes either way.
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def most_answer_bytes(
    prompt: Prompt, params: SamplingParams, routes: RouteShape | None = None
) -> int:
    """Length that no answer to ``make_request`` of these needs.

    Args:
        prompt: as there.
        params: as there.
        routes: of every token, where they are asked for.
    """
    num_tokens = len(prompt.prompt_ids) + params.max_response_tokens
    experts = routes.num_layers * routes.topk if routes else 0
    bytes_per_token = _BYTES_PER_TOKEN + experts * _BYTES_PER_EXPERT
    return (1 << 20) + params.num_generations * num_tokens * bytes_per_token


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


def _request_seed(seed: int | None, prompt_id: str, generation: int) -> int | None:
    """Seed of one request: prompts and generations must not share their random numbers."""
    if seed is None:
        return None
    return zlib.crc32(f"{seed}/{prompt_id}/{generation}".encode()) & 0x7FFFFFFF


def _drop_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
