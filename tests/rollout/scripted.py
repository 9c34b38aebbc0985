"""A server that probes well and then answers what a test says."""

from __future__ import annotations

import json
from functools import cached_property

from megatron_pg.rollout import OpenAIServerSource, RetryPolicy, SamplingParams

from .helpers import CharTokenizer
from .stand_in import completion, vllm_like

PARAMS = SamplingParams(num_generations=3, max_response_tokens=4, seed=5)
VOCAB_SIZE = 50


def generated(tokens, reason="stop", **changes):
    """One response as SGLang's /generate sends it."""
    pairs = [[-0.5 * (i + 1), token, None] for i, token in enumerate(tokens)]
    meta = {"finish_reason": {"type": reason}, "output_token_logprobs": pairs, "prompt_tokens": 2}
    return {"text": "x" * len(tokens), "output_ids": tokens[:-1], "meta_info": meta} | changes


class Scripted:
    """Probes well as the dialect; then answers ``reply``, the same for every request."""

    def __init__(self, dialect):
        self.dialect = dialect
        self.path = "/generate" if dialect == "sglang" else "/v1/completions"
        self.reply = None
        self.url = ""

    def good(self):
        """A whole answer that nothing is wrong with."""
        if self.dialect == "sglang":
            return [generated([5, 6]) for _ in range(3)]
        choices = [completion([5, 6], index=i, prompt_token_ids=[100, 7]) for i in range(3)]
        if self.dialect == "text":
            choices = [{"index": i, "text": "ab", "finish_reason": "stop"} for i in range(3)]
        usage = {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
        return {"choices": choices, "usage": usage, "model": "served"}

    def __call__(self, path, body):
        if path in ("/health", "/v1/models"):
            return vllm_like(path, body)
        if path != self.path or (self.dialect == "text") != isinstance(body.get("prompt"), str):
            return 404, {"error": "no such path"}
        params = body.get("sampling_params", {})
        if 1 in (body.get("max_tokens"), params.get("max_new_tokens")):
            answer = self.good()
            return 200, answer[:2] if path == "/generate" else answer | {
                "choices": answer["choices"][:2]
            }
        status, answer, *headers = self.reply
        return status, answer if isinstance(answer, str | bytes) else json.dumps(answer), *headers

    @cached_property
    def source(self):
        """A source that was started once and asks again and again."""
        is_text = self.dialect == "text"
        return OpenAIServerSource(
            self.url,
            retry=RetryPolicy(max_attempts=2, first_wait_seconds=0),
            vocab_size=VOCAB_SIZE,
            tokenizer=CharTokenizer() if is_text else None,
            allow_retokenize=is_text,
        )
