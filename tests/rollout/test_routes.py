"""Experts of every token, asked of servers in their dialects."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch

from megatron_pg.data import RouteShape
from megatron_pg.rollout import (
    OpenAIServerSource,
    RetryPolicy,
    RolloutServerError,
    SamplingParams,
    make_groups,
)

from .helpers import CharTokenizer, make_prompt
from .stand_in import completion, stand_in, vllm_like

SHAPE = RouteShape(num_experts=4, topk=2, has_experts=(True, False, True))
PARAMS = SamplingParams(num_generations=3, max_response_tokens=8)
PROMPT_LEN = len(make_prompt().prompt_ids)


def routes(num_tokens: int, seed: int) -> np.ndarray:
    """As engines report them: none of the last token, zeros in layers without experts."""
    generator = np.random.default_rng(seed)
    found = generator.permuted(np.tile(np.arange(4), (num_tokens - 1, 3, 1)), axis=2)[..., :2]
    found[:, 1] = 0
    return found


def npy(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def bare(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def vllm(path, body, encode=lambda array: npy(array.astype(np.uint8))):
    status, answer = vllm_like(path, body)
    for choice in answer.get("choices", []) if isinstance(answer, dict) else []:
        tokens = PROMPT_LEN if len(body["prompt"]) == PROMPT_LEN else len(body["prompt"])
        tokens += len(choice["token_ids"])
        choice["routed_experts"] = encode(routes(tokens, choice["index"]))
    return status, answer


def experts_alone(path, body):
    """A server that leaves out the layers without experts."""
    return vllm(path, body, lambda array: npy(array[:, ::2].astype(np.uint16)))


def sglang_completions(path, body):
    """One set of routes an answer, beside the choices."""
    status, answer = vllm(path, body, bare)
    if path == "/v1/completions":
        assert body["return_routed_experts"] is True
        of_all = [choice.pop("routed_experts") for choice in answer["choices"]]
        answer["sglext"] = {"routed_experts": of_all[0]}
    return status, answer


def sglang(path, body):
    if path == "/v1/completions":
        return 404, {"error": "no such path"}
    if path != "/generate":
        return vllm_like(path, body)
    assert body["return_routed_experts"] is True
    choices = []
    for number in range(body["sampling_params"]["n"]):
        meta = {
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-0.5, 5, None], [-0.25, number, None]],
            "routed_experts": bare(routes(len(body["input_ids"]) + 2, number)),
        }
        choices.append({"text": "x", "output_ids": [5, number], "meta_info": meta})
    return 200, choices


def source_of(url: str, **fields) -> OpenAIServerSource:
    fields = {"routes": SHAPE, "retry": RetryPolicy(max_attempts=1)} | fields
    return OpenAIServerSource(url, startup_seconds=1.0, **fields)


@pytest.mark.parametrize(
    ("server", "dialect", "supports_n"),
    [
        (vllm, "token_ids", True),
        (experts_alone, "token_ids", True),
        (sglang_completions, "token_ids", False),
        (sglang, "sglang", True),
    ],
    ids=["vllm", "experts_alone", "sglang_completions", "sglang_generate"],
)
def test_routes_come_with_responses_into_samples(server, dialect, supports_n):
    with stand_in(server) as running:
        source = source_of(running.url)
        prompts = [make_prompt(0), make_prompt(1)]
        responses = source.generate(prompts, PARAMS)
        can = source.start()
    assert (can.dialect, can.supports_n) == (dialect, supports_n)
    groups = make_groups(prompts, responses, lambda prompt, response: 1.0)
    for group in groups:
        for number, sample in enumerate(group.samples):
            want = routes(len(sample.tokens), number if supports_n else 0)
            found = sample.routed_experts
            assert found[:-1].tolist() == want.tolist() and (found[-1] == -1).all()


def test_routes_are_not_asked_for_unless_wanted():
    with stand_in(vllm) as running:
        source = source_of(running.url, routes=None)
        ((one, *_),) = source.generate([make_prompt()], PARAMS)
        assert all("return_routed_experts" not in b for b in running.bodies("/v1/completions"))
    assert one.routed_experts is None


def test_a_server_that_reports_none_is_refused_at_its_start():
    told = "--enable-return-routed-experts"
    with stand_in(vllm_like) as running, pytest.raises(RolloutServerError, match=told):
        source_of(running.url).start()


def broken(change):
    """vLLM after its probe, with another form of routes in response 1."""

    def handler(path, body):
        status, answer = vllm(path, body)
        if path == "/v1/completions" and body["n"] == 3:
            choice = next(c for c in answer["choices"] if c["index"] == 1)
            choice["routed_experts"] = change(routes(PROMPT_LEN + len(choice["token_ids"]), 1))
        return status, answer

    return handler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: None, "comes without routed_experts"),
        (lambda array: npy(array[1:]), "rows, prompt and response have"),
        (lambda array: npy(array[:, :1]), "the model has 3 layers, 2 of them with experts"),
        (lambda array: npy(array[:, :2]), "must be different experts"),
        (lambda array: npy(array[..., :1]), "and 2 of these to a token"),
        (lambda array: bare(array[:, ::2]), "bytes, no multiple of 24"),
        (lambda array: npy(array + 4), "must be different experts in [0, 4)"),
        (lambda array: npy(array * 0), "must be different experts"),
        (lambda array: "", "has 0 rows"),
        (lambda array: {"a": 1}, "must have shape, dtype and base64"),
    ],
    ids=[
        *("missing", "short", "layers", "dense", "topk", "bare", "beyond", "twice", "empty"),
        "object",
    ],
)
def test_malformed_routes_are_refused(change, message):
    with stand_in(broken(change)) as running, pytest.raises(RolloutServerError) as error:
        source_of(running.url).generate([make_prompt()], PARAMS)
    assert "response 1" in str(error.value) and message in str(error.value)


def test_an_aborted_response_needs_no_routes():
    def handler(path, body):
        status, answer = vllm(path, body)
        if path == "/v1/completions" and body["n"] == 3:
            answer["choices"][0] = completion([], "abort", answer["choices"][0]["index"])
        return status, answer

    with stand_in(handler) as running:
        (responses,) = source_of(running.url).generate([make_prompt()], PARAMS)
    assert [one.routed_experts is None for one in responses].count(True) == 1


def test_retokenized_text_has_no_routes():
    with pytest.raises(ValueError, match="belong to the exact tokens"):
        source_of("http://h", allow_retokenize=True, tokenizer=CharTokenizer())


def test_a_long_answer_of_many_layers_is_taken():
    """The limit of an answer grows with the routes that were asked for."""
    deep = RouteShape(num_experts=512, topk=8, has_experts=(True,) * 90)
    rows = 400

    def handler(path, body):
        status, answer = vllm_like(path, body)
        if path == "/v1/completions":
            for choice in answer["choices"]:
                tokens = rows if body["n"] == 3 else 1
                choice.update(completion([7] * tokens, index=choice["index"]))
                size = len(body["prompt"]) + tokens - 1
                array = np.tile(np.arange(8), (size, 90, 1)) + np.arange(size)[:, None, None]
                choice["routed_experts"] = npy(array.astype(np.int32) % 512)
        return status, answer

    params = SamplingParams(num_generations=3, max_response_tokens=rows)
    with stand_in(handler) as running:
        (responses,) = source_of(running.url, routes=deep).generate([make_prompt()], params)
    assert all(one.routed_experts.dtype == torch.int16 for one in responses)
