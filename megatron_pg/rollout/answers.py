"""What an inference server answered: whether it is what was asked for, and the responses in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import RouteShape, Status, decode_routes, response_problems
from .base import Tokenizer
from .dialects import Dialect
from .values import Prompt, Response, SamplingParams

# Any other finish reason ("abort", "error", null) is that of a response that came to no end.
_STATUS: dict[str | None, Status] = {
    "stop": "completed",
    "length": "truncated",
    "repetition": "truncated",
}


@dataclass(frozen=True)
class RawResponse:
    """One response as a server sent it; its values are not looked at yet.

    Attributes:
        token_ids: None where the server did not tell.
        logprobs: None where the server did not tell.
        text: decoded response.
        finish_reason: in the server's words.
        other_ids: the tokens by a second field, or None; it may lack the end token.
        routes: the experts of prompt and response, or None where the server did not tell.
    """

    token_ids: list[Any] | None
    logprobs: list[Any] | None
    text: str
    finish_reason: str | None
    other_ids: list[Any] | None = None
    routes: Any = None

    @property
    def status(self) -> Status:
        """Whether the response ended by itself."""
        return status_of(self.finish_reason)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.status != "aborted" and bool(self.text or self.token_ids)


@dataclass(frozen=True)
class Answer:
    """What a server sent for one prompt.

    Attributes:
        responses: in the server's numbering.
        model: whose they are, or None.
        prompt_lens: tokens of the prompt wherever the server counts them.
        prompts: token ids of the prompt wherever the server repeats them.
        num_generated: tokens of all responses by the server's count, or None.
    """

    responses: list[RawResponse]
    model: str | None = None
    prompt_lens: Sequence[int] = ()
    prompts: Sequence[list[Any]] = ()
    num_generated: int | None = None


def status_of(finish_reason: str | None) -> Status:
    """Whether a response with this finish reason ended by itself."""
    return _STATUS.get(finish_reason, "aborted")


def answer_problems(
    dialect: Dialect,
    answer: Answer,
    prompt: Prompt,
    params: SamplingParams,
    *,
    vocab_size: int | None,
    with_logprobs: bool,
    routes: RouteShape | None = None,
) -> list[str]:
    """What keeps an answer's values from being trained; empty when nothing does.

    Args:
        dialect: of the answer.
        answer: to the request of ``prompt`` and ``params``.
        prompt: what was sent.
        params: what was asked for.
        vocab_size: token ids must lie below; None checks only that they are plausible.
        with_logprobs: whether the server is known to send logprobs.
        routes: what the experts of every token have to be like; None does not look at them.
    """
    if len(answer.responses) != params.num_generations:
        return [f"{len(answer.responses)} responses instead of {params.num_generations}"]
    if dialect == "text":
        most = params.num_generations * params.max_response_tokens
        if (answer.num_generated or 0) > most:
            return [f"{answer.num_generated} tokens were generated, at most {most} were asked"]
        return []
    problems = list(_count_problems(answer, prompt))
    for number, raw in enumerate(answer.responses):
        found = response_problems(
            raw.token_ids or [],
            raw.logprobs,
            vocab_size=vocab_size,
            max_response_tokens=params.max_response_tokens,
        )
        if raw.trains:
            found += _gaps(raw, with_logprobs)
            found += [] if routes is None else _route_problems(raw, prompt, routes)
        problems += [f"response {number} {problem}" for problem in found]
    return problems


def make_response(
    raw: RawResponse,
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    version: int,
    routes: RouteShape | None = None,
) -> Response:
    """A response from what the server sent, once nothing is wrong with it.

    Args:
        raw: part of an answer.
        prompt: that it answers.
        tokenizer: tokenizes the text where the server sent no token ids.
        version: of the weights, kept in ``metadata["weight_version"]``.
        routes: what the experts of its tokens have to be like; None leaves them out.

    Raises:
        ValueError: if a completed text needs an end token and the tokenizer has none.
    """
    metadata: dict[str, Any] = {"weight_version": version, "finish_reason": raw.finish_reason}
    token_ids = raw.token_ids
    if token_ids is None and raw.text and tokenizer is not None:
        metadata["retokenized"] = True
        token_ids = tokenizer.encode(raw.text, add_special_tokens=False)
        if token_ids and raw.status == "completed":
            token_ids = [*token_ids, _end_token(tokenizer)]
    has_logprobs = raw.trains and raw.logprobs is not None
    return Response(
        response_ids=torch.tensor(token_ids or [], dtype=torch.int64),
        text=raw.text,
        rollout_logprobs=torch.tensor(raw.logprobs, dtype=torch.float64) if has_logprobs else None,
        routed_experts=_read_routes(raw, prompt, routes) if routes and raw.trains else None,
        status=raw.status,
        metadata=metadata,
    )


def _read_routes(raw: RawResponse, prompt: Prompt, routes: RouteShape) -> Tensor:
    """Experts of the tokens of a prompt and its response. Raises ValueError if they are none."""
    num_tokens = len(prompt.prompt_ids) + len(raw.token_ids or ())
    width = routes.num_layers, routes.topk
    return routes.of_model(decode_routes(raw.routes, width, num_tokens))


def _route_problems(raw: RawResponse, prompt: Prompt, routes: RouteShape) -> list[str]:
    if raw.routes is None:
        return ["comes without routed_experts, which were asked for"]
    try:
        _read_routes(raw, prompt, routes)
    except ValueError as error:
        return [f"has routed_experts: {error}"]
    return []


def _gaps(raw: RawResponse, with_logprobs: bool) -> Iterator[str]:
    if not raw.token_ids:
        yield "comes without token ids"
    elif raw.logprobs is None and with_logprobs:
        yield "comes without logprobs, which this server sent before"
    if raw.other_ids and raw.other_ids != (raw.token_ids or [])[: len(raw.other_ids)]:
        yield "has two fields that name different tokens"


def _count_problems(answer: Answer, prompt: Prompt) -> Iterator[str]:
    sent = prompt.prompt_ids.tolist()
    for prompt_len in answer.prompt_lens:
        if prompt_len != len(sent):
            yield (
                f"the server counts {prompt_len} prompt tokens where {len(sent)} were sent: it "
                "tokenizes anew, or cuts the prompt"
            )
    if any(ids != sent for ids in answer.prompts):
        yield "prompt_token_ids are not the tokens that were sent"
    received = sum(len(raw.token_ids or ()) for raw in answer.responses if raw.trains)
    if answer.num_generated is not None and received > answer.num_generated:
        yield (
            f"{received} token ids came where the server counts {answer.num_generated} generated "
            "ones: others, such as the prompt's, are among them"
        )


def _end_token(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the server sent a response without token ids and no end token is known; pass a "
            "tokenizer with an eos_token_id"
        )
    return tokenizer.eos_token_id
